// An explained model and what runs it.

import { sourceOf } from "./assets.js";
import { cardOf, checkEnds } from "./card.js";
import { rgbOf } from "./picture.js";

const LIBRARY = "ort/ort.wasm.bundle.min.mjs";
const WASM = "ort/ort-wasm-simd-threaded.wasm";

/** The worker, as functions that return promises. */
export class Engine {
  #worker;
  #waiting = new Map();
  #count = 0;
  #started;

  constructor() {
    this.#started = this.#start();
    this.#started.catch(() => {}); // whoever calls next is told
  }

  async #start() {
    const [worker, library, wasm] = await Promise.all(["worker.js", LIBRARY, WASM].map(sourceOf));
    this.#worker = new Worker(worker instanceof Blob ? URL.createObjectURL(worker) : worker);
    this.#worker.addEventListener("message", ({ data: { id, result, error } }) => {
      const { resolve, reject } = this.#waiting.get(id);
      this.#waiting.delete(id);
      if (error === undefined) resolve(result);
      else reject(new Error(error));
    });
    this.#worker.addEventListener("error", (event) => {
      for (const { reject } of this.#waiting.values()) reject(new Error(event.message ?? "the worker stopped"));
      this.#waiting.clear();
    });
    const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
    try {
      await this.#send("start", { library, wasm, threads });
    } catch (error) {
      throw new Error(`onnxruntime-web does not start (${error.message}). Fetch it once with \`onnxcam web --fetch\``);
    }
  }

  #send(job, given, transfer = []) {
    const id = this.#count++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, job, given }, transfer);
    });
  }

  /** Have the worker do `job`; see worker.js. */
  async do(job, given, transfer) {
    await this.#started;
    return this.#send(job, given, transfer);
  }
}

/** A model that explains photos. */
export class Model {
  #engine;
  #number;
  #wanted;

  constructor(engine, card, { number, inputs }) {
    this.#engine = engine;
    this.#number = number;
    this.#wanted = inputs.includes("cam_wanted");
    this.card = card;
  }

  /** Open the model in `bytes`, an ArrayBuffer that is given away; an Error says why it cannot be used. */
  static async open(engine, bytes) {
    const content = new Uint8Array(bytes);
    const card = cardOf(content);
    const session = await engine.do("load", { bytes: content }, [bytes]);
    const model = new Model(engine, card, session);
    try {
      checkEnds(card, session.inputs, session.outputs);
    } catch (error) {
      await model.close();
      throw error;
    }
    return model;
  }

  /** Free what the model holds. */
  close() {
    return this.#engine.do("close", { number: this.#number });
  }

  /** Return the name of a class. */
  label(index) {
    return this.card.labels?.[index] ?? String(index);
  }

  /**
   * Explain one class of a photo.
   *
   * @param photo ImageData.
   * @param index the class, or -1 for the best.
   * @returns {index, scores, order, cam, heatmap}: scores are probabilities, order the classes from the best on,
   *     heatmap Float32Array [height, width].
   */
  async explain(photo, index) {
    const picture = rgbOf(photo);
    const feeds = {
      [this.card.picture]: ["uint8", picture, [1, photo.height, photo.width, 3]],
      cam_class: ["int64", BigInt64Array.of(BigInt(index)), [1, 1]],
    };
    if (this.#wanted) feeds.cam_wanted = ["bool", Uint8Array.of(1), []];
    const outputs = [this.card.scores, "cam", "cam_heatmap"];
    const results = await this.#engine.do("run", { number: this.#number, feeds, outputs }, [picture.buffer]);
    const raw = ofClasses(results[this.card.scores]);
    const scores = this.card.scores_are === "probabilities" ? raw : softmax(raw);
    if (!scores.every(Number.isFinite)) throw new Error("the scores of this photo are not finite.");
    const order = [...scores.keys()].sort((a, b) => raw[b] - raw[a]);
    return {
      index: index < 0 ? order[-1 - index] : index,
      scores,
      order,
      cam: results.cam.data,
      heatmap: results.cam_heatmap.data,
    };
  }
}

/** Return one score for each class: dense ones [1,M,H,W] are averaged over the places. */
function ofClasses({ data, dims: [, classes] }) {
  const places = data.length / classes;
  return Float64Array.from({ length: classes }, (_, index) => {
    let sum = 0;
    for (let place = 0; place < places; place++) sum += data[index * places + place];
    return sum / places;
  });
}

function softmax(scores) {
  const most = scores.reduce((a, b) => Math.max(a, b));
  const powers = scores.map((score) => Math.exp(score - most));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}
