// What an explained model says about itself: docs/format.md. onnxruntime-web does not hand out the metadata.

const KEY = "onnxcam";
const FORMAT = 1;
const GRAPH = 7; // of ModelProto in onnx.proto
const METADATA = 14;

// What stands in backquotes is shown as a command.
const ATTACH = `Attach the original model with
\`onnxcam attach model.onnx \\
  -o explained.onnx \\
  --embed-preprocess \\
  --class-input required\` and --color, --scale, --mean, --std and --resize as it was trained.`;

/** Return the card of the model in `bytes`, a Uint8Array; an Error says what is missing and what to do. */
export function cardOf(bytes) {
  const text = new TextDecoder();
  let graph = false;
  let json = null;
  try {
    for (const [number, value] of fields(bytes)) {
      graph ||= number === GRAPH;
      if (number !== METADATA) continue;
      const entry = Object.fromEntries(fields(value)); // 1: key, 2: value
      if (text.decode(entry[1]) === KEY) json = text.decode(entry[2]);
    }
  } catch {
    graph = false;
  }
  if (!graph) throw new Error("it is not an ONNX model, or it is damaged.");
  if (json === null) throw new Error(`it does not explain itself yet. ${ATTACH}`);
  const card = parsed(json);
  if (card?.format !== FORMAT) {
    throw new Error(`its card has format ${card?.format}; this page reads format ${FORMAT}. ${ATTACH}`);
  }
  if (!card.picture) throw new Error(`it does not prepare the photo itself. ${ATTACH}`);
  if (card.target === "seed") {
    throw new Error(`it explains a weighted sum of scores, but this page shows classes. ${ATTACH}`);
  }
  return card;
}

/** See that the model has the inputs and outputs that the page needs. */
export function checkEnds(card, inputs, outputs) {
  if (!inputs.includes("cam_class")) {
    throw new Error(`it leaves the class optional, which no browser can change. ${ATTACH}`);
  }
  for (const name of [card.scores, "cam", "cam_heatmap"]) {
    if (!outputs.includes(name)) throw new Error(`it has no output ${name}. ${ATTACH}`);
  }
  const known = [card.picture, "cam_class", "cam_wanted"];
  const unknown = inputs.find((name) => !known.includes(name));
  if (unknown) throw new Error(`it has an input ${unknown} that this page cannot fill.`);
}

function parsed(json) {
  try {
    return JSON.parse(json);
  } catch {
    throw new Error(`its card is damaged. ${ATTACH}`);
  }
}

/** Yield number and value of each field of a protobuf message: a number, or a view of its bytes. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    for (let value = 0, unit = 1; at < bytes.length; unit *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * unit;
      if (byte < 128) return value;
    }
    throw new RangeError("cut short");
  };
  const take = (count) => {
    if (count > bytes.length - at) throw new RangeError("cut short");
    at += count;
    return bytes.subarray(at - count, at);
  };
  const readers = { 0: varint, 1: () => take(8), 2: () => take(varint()), 5: () => take(4) };
  while (at < bytes.length) {
    const tag = varint();
    yield [Math.floor(tag / 8), readers[tag % 8]()];
  }
}
