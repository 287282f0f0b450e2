// onnxruntime-web, in Node (as a program, for its wasm provider) and in a page (as a module).
const views = {
  float32: Float32Array,
  int64: BigInt64Array,
  bool: Uint8Array,
  uint8: Uint8Array,
};

function unpacked(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}

function packed(array) {
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 32768)
    text += String.fromCharCode(...bytes.subarray(i, i + 32768));
  return btoa(text);
}

/** Runs a model (base64) once; feeds and outputs are {name: {type, dims, data: base64}}. */
export async function run(ort, model, feeds, provider) {
  ort.env.logLevel = "error";
  const session = await ort.InferenceSession.create(unpacked(model), {
    executionProviders: [provider],
    logSeverityLevel: 3,
  });
  try {
    const tensors = {};
    for (const [name, { type, dims, data }] of Object.entries(feeds))
      tensors[name] = new ort.Tensor(type, new views[type](unpacked(data).buffer), dims);
    const found = await session.run(tensors);
    const outputs = {};
    for (const [name, { type, dims, data }] of Object.entries(found))
      outputs[name] = { type, dims, data: packed(data) };
    return outputs;
  } finally {
    await session.release();
  }
}

if (globalThis.process?.argv[1]?.endsWith("web.mjs")) {
  const { createRequire } = await import("node:module");
  const { createInterface } = await import("node:readline");
  const { readFileSync } = await import("node:fs");
  const ort = createRequire(process.argv[2] + "/")("onnxruntime-web");
  ort.env.wasm.numThreads = 1;
  for await (const line of createInterface({ input: process.stdin })) {
    const request = JSON.parse(line);
    let answer;
    try {
      const model = readFileSync(request.model).toString("base64");
      answer = { outputs: await run(ort, model, request.feeds, "wasm") };
    } catch (error) {
      answer = { error: String(error?.message ?? error) };
    }
    process.stdout.write(JSON.stringify(answer) + "\n");
  }
}
