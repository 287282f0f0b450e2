// The files beside the page: on its server or, where the page is one file, inside of it.

const TYPES = { js: "text/javascript", mjs: "text/javascript", wasm: "application/wasm" };

/** Return the content of the file at `path`, an ArrayBuffer. */
export async function contentOf(path) {
  const inside = document.getElementById(path);
  if (inside) {
    const packed = await fetch(`data:;base64,${inside.textContent}`);
    return new Response(packed.body.pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
  }
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`the server has no ${path} (${answer.status})`);
  return answer.arrayBuffer();
}

/** Return the address of the file at `path`; a Blob where it is inside of the page. */
export async function sourceOf(path) {
  if (!document.getElementById(path)) return new URL(path, document.baseURI).href;
  return new Blob([await contentOf(path)], { type: TYPES[path.split(".").pop()] });
}
