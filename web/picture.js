// Photos in, pixels out, by the rules of onnxcam/image.py.

const LONGEST = 2048; // pixels of the longer edge; larger photos are reduced to it

/**
 * Return the picture in `blob` as ImageData: upright, without transparency.
 *
 * Colour profiles are ignored, as Python does: the model gets the numbers in the file.
 */
export async function pictureIn(blob) {
  const exact = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, exact);
  } catch {
    throw new Error("it is not a picture that this browser can read.");
  }
  return pixelsOf(bitmap, bitmap.width, bitmap.height);
}

/** Return what `source` shows, width x height, as ImageData over white. */
export function pixelsOf(source, width, height) {
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, canvas.width, canvas.height);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** Return the colours of ImageData without its alpha, Uint8Array [height, width, 3]. */
export function rgbOf({ data }) {
  const rgb = new Uint8Array((data.length / 4) * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    rgb[to++] = data[from];
    rgb[to++] = data[from + 1];
    rgb[to++] = data[from + 2];
  }
  return rgb;
}
