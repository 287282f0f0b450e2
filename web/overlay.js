// Maps as pictures, by the rules of onnxcam/render.py.

import { AGAINST, LUMA, PALE, SIGNED, UNSIGNED } from "./colors.js";

/** Return the colours that a map of this evidence is drawn in. */
const scaleOf = (evidence) => (AGAINST.includes(evidence) ? SIGNED : UNSIGNED);

/** Return the place of a value in a colour scale; what is not finite counts as 0. */
function levelOf(value, scale) {
  const finite = Number.isFinite(value) ? value : 0;
  if (scale === UNSIGNED) return Math.round(Math.min(Math.max(finite, 0), 1) * 255);
  return Math.round((Math.min(Math.max(finite, -1), 1) + 1) * 127);
}

/**
 * Return the place of each value of a heat map, Uint8Array [height, width].
 *
 * @param heatmap Float32Array [height, width], 0 to 1, or -1 to 1 for evidence against the class.
 * @param evidence what the map shows, as the card says.
 */
export function levelsOf(heatmap, evidence) {
  const scale = scaleOf(evidence);
  const sign = evidence === "counterfactual" ? -1 : 1;
  const levels = new Uint8Array(heatmap.length);
  for (let pixel = 0; pixel < levels.length; pixel++) levels[pixel] = levelOf(sign * heatmap[pixel], scale);
  return levels;
}

/**
 * Return `photo` with a map over it, ImageData.
 *
 * @param photo ImageData.
 * @param levels of the map, as levelsOf returns them.
 * @param seen the part that the model saw, as seenBy returns it: beyond it the photo is grey and pale.
 * @param opacity 0 to 1, of the map where it is strongest.
 * @param evidence what the map shows.
 */
export function overlay(photo, levels, seen, opacity, evidence) {
  const scale = scaleOf(evidence);
  const alphas = Float64Array.from(scale.strengths, (strength) => Math.round(255 * opacity * strength) / 255);
  const tints = Float64Array.from(scale.colors, (color, at) => color * alphas[Math.floor(at / 3)]);
  const mute = scale === SIGNED ? Math.min(2 * opacity, 1) : opacity;
  const { width, height, data } = photo;
  const drawn = new ImageData(width, height);
  const out = drawn.data;
  for (let y = 0, at = 0, pixel = 0; y < height; y++) {
    const inside = y >= seen.top && y < seen.bottom;
    for (let x = 0; x < width; x++, at += 4, pixel++) {
      const luma = LUMA[0] * data[at] + LUMA[1] * data[at + 1] + LUMA[2] * data[at + 2];
      if (inside && x >= seen.left && x < seen.right) {
        const tint = 3 * levels[pixel];
        const rest = 1 - alphas[levels[pixel]];
        const grey = rest * mute * luma;
        const color = rest * (1 - mute);
        out[at] = tints[tint] + grey + color * data[at];
        out[at + 1] = tints[tint + 1] + grey + color * data[at + 1];
        out[at + 2] = tints[tint + 2] + grey + color * data[at + 2];
      } else {
        out[at] = out[at + 1] = out[at + 2] = PALE * luma + (1 - PALE) * 255;
      }
      out[at + 3] = 255;
    }
  }
  return drawn;
}

/** Return the box of pixels of a width x height photo that a model with this `input` sees, if only in part. */
export function seenBy(input, width, height) {
  if (!input.resize.startsWith("crop")) return { left: 0, top: 0, right: width, bottom: height };
  const edge = Number(input.resize.split(":")[1] ?? Math.max(input.height, input.width));
  const along = (pixels, wanted) => {
    const resized = Math.trunc((edge * pixels) / Math.min(width, height));
    const low = (halfToEven((resized - wanted) / 2) * pixels) / resized;
    const high = low + (wanted * pixels) / resized;
    return [Math.max(0, Math.floor(low + 1e-6)), Math.min(pixels, Math.ceil(high - 1e-6))];
  };
  const [left, right] = along(width, input.width);
  const [top, bottom] = along(height, input.height);
  return { left, top, right, bottom };
}

/** Round as Python does. */
function halfToEven(value) {
  const near = Math.round(value);
  return Math.abs(value % 1) === 0.5 && near % 2 !== 0 ? near - 1 : near;
}

/** Return what is odd about a raw map, in words; empty if nothing is. */
export function remarkOn(cam, evidence) {
  if (!cam.every(Number.isFinite)) return "the map is not finite";
  let [least, most] = [Infinity, -Infinity];
  for (const value of cam) [least, most] = [Math.min(least, value), Math.max(most, value)];
  if (least === most && most !== 0) return "the map is flat";
  if (most > 0 || (evidence === "against" && least < 0)) return "";
  if (least < 0) return "the map is all negative: nothing speaks for the class";
  const side = { against: "against", counterfactual: "against", both: "for or against" }[evidence] ?? "for";
  return `the map is all zero: nothing speaks ${side} the class`;
}

/** Return where a map is strongest, in percent from the left and from the top; null if it is nowhere. */
export function peakOf(heat, width) {
  let best = 0;
  let place = -1;
  for (let index = 0; index < heat.length; index++) {
    if (Math.abs(heat[index]) > best) [best, place] = [Math.abs(heat[index]), index];
  }
  if (place < 0) return null;
  const height = heat.length / width;
  return [((place % width) + 0.5) / width, (Math.floor(place / width) + 0.5) / height].map((part) =>
    Math.round(100 * part),
  );
}

/** Draw the colour scale into a canvas of one row, and return what its ends mean. */
export function drawBar(canvas, evidence) {
  const scale = scaleOf(evidence);
  const low = scale === SIGNED ? -1 : 0;
  const high = scale === SIGNED && evidence !== "both" ? 0 : 1;
  const line = new ImageData(canvas.width, 1);
  for (let x = 0; x < canvas.width; x++) {
    const level = levelOf(low + ((high - low) * x) / (canvas.width - 1), scale);
    line.data.set(scale.colors.subarray(3 * level, 3 * level + 3), 4 * x);
    line.data[4 * x + 3] = scale === SIGNED ? 255 * scale.strengths[level] : 255;
  }
  canvas.getContext("2d").putImageData(line, 0, 0);
  if (scale === UNSIGNED) return ["low", "high"];
  return ["against", evidence === "both" ? "for" : "nothing"];
}
