// Runs onnxruntime-web away from the page, which stays responsive. A classic script: from file: no other starts.

let ort;
const sessions = new Map();

const jobs = {
  async start({ library, wasm, threads }) {
    ort = await import(address(library));
    ort.env.wasm.wasmPaths = { wasm: address(wasm) };
    ort.env.wasm.numThreads = threads;
  },

  async load({ bytes }) {
    const options = { executionProviders: ["wasm"], logSeverityLevel: 3 }; // it would warn of an optional cam_class
    const session = await ort.InferenceSession.create(bytes, options);
    const number = sessions.size ? Math.max(...sessions.keys()) + 1 : 0;
    sessions.set(number, session);
    return { number, inputs: session.inputNames, outputs: session.outputNames };
  },

  async run({ number, feeds, outputs }) {
    const tensors = Object.entries(feeds).map(([name, args]) => [name, new ort.Tensor(...args)]);
    const results = await sessions.get(number).run(Object.fromEntries(tensors), outputs);
    return Object.fromEntries(outputs.map((name) => [name, plain(results[name])]));
  },

  async close({ number }) {
    await sessions.get(number).release();
    sessions.delete(number);
  },
};

/** A worker of a page that has no server may not read its page's blob addresses, but its own. */
const address = (source) => (source instanceof Blob ? URL.createObjectURL(source) : source);

function plain({ type, data, dims }) {
  if (type === "float16" && data instanceof Uint16Array) {
    throw new Error("this browser cannot read 16-bit floats; a newer one can");
  }
  return { data, dims };
}

async function answer({ id, job, given }) {
  try {
    postMessage({ id, result: await jobs[job](given) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
}

let last = Promise.resolve();
self.addEventListener("message", ({ data }) => {
  last = last.then(() => answer(data)); // one after the other
});
