// The page: what a person does, and what is shown.

import { contentOf } from "./assets.js";
import { OPACITY } from "./colors.js";
import { Engine, Model } from "./model.js";
import { drawBar, levelsOf, overlay, peakOf, remarkOn, seenBy } from "./overlay.js";
import { pictureIn, pixelsOf } from "./picture.js";

const BEST = -1;
const SHOWN = 5;

const element = (id) => document.getElementById(id);
const engine = new Engine();

const offered = []; // models to choose from, {name, read}

let current = -1; // place of the model there
let model = null;
let photo = null; // ImageData
let shown = null; // what model.explain returned last, and the levels of the map
let asked = null; // {index}: the class to explain next
let running = false;

// What happens: a photo, a model, a class.

/** Take files that were chosen, dropped or pasted: a model, or a photo. */
async function take([file]) {
  if (!file) return;
  if (file.name.toLowerCase().endsWith(".onnx")) {
    await openModel({ name: file.name, read: () => file.arrayBuffer() });
  } else {
    await attempt(`${file.name} cannot be shown`, async () => setPhoto(await pictureIn(file)));
  }
}

function setPhoto(picture) {
  photo = picture;
  forget();
  paint();
  explain(BEST);
}

/** Open a model, {name, read}; the one before stays until this one works. */
async function openModel(entry) {
  const { name } = entry;
  await attempt(`${name} cannot be used`, async () => {
    say(`Loading ${name}…`, true);
    const opened = await Model.open(engine, await entry.read());
    model?.close();
    model = opened;
    if (!offered.includes(entry)) offer(entry);
    current = offered.indexOf(entry);
    forget();
    const { method, module, layer, labels } = model.card;
    element("about").textContent = `${name}: ${method} at ${module ?? layer}`;
    element("labels").replaceChildren(...(labels ?? []).map((label) => new Option(label)));
    [element("low").textContent, element("high").textContent] = drawBar(element("bar"), model.card.evidence);
    explain(BEST);
  });
  element("models").selectedIndex = current;
}

/** Add a model to those that can be chosen. */
function offer(entry) {
  offered.push(entry);
  element("models").append(new Option(entry.name));
  element("models").hidden = false;
}

/** Explain a class. While the model runs only the class asked for last is kept. */
async function explain(index) {
  asked = { index };
  if (running) return;
  running = true;
  while (asked && model && photo) {
    const [from, of] = [model, photo];
    const { index: wanted } = asked;
    asked = null;
    await attempt("The photo cannot be explained", async () => {
      say("The model looks at the photo…", true);
      const found = await from.explain(of, wanted);
      if (from === model && of === photo && !asked) show(found);
    });
  }
  running = false;
  if (!photo) say("Now choose a photo.");
  else if (!model) say("Now open an explained model.");
}

// What is shown.

function show(found) {
  shown = { ...found, levels: levelsOf(found.heatmap, model.card.evidence) };
  const top = found.order.slice(0, SHOWN);
  if (!element("list").childElementCount) element("list").replaceChildren(...top.map(choice));
  if (!radio(found.index)) element("list").append(choice(found.index));
  radio(found.index).checked = true;
  element("classes").hidden = false;
  element("view").hidden = false;
  paint();
  const canvas = element("picture");
  const name = model.label(found.index);
  const remark = remarkOn(found.cam, model.card.evidence);
  const peak = remark ? null : peakOf(found.heatmap, photo.width);
  const place = peak ? `strongest ${peak[0]} % from the left and ${peak[1]} % from the top` : remark;
  canvas.setAttribute("aria-label", `Heat map for ${name} over the photo; ${place}`);
  canvas.dataset.class = found.index; // these two for programs that look at the page
  canvas.explanation = { ...found, label: name, labels: top.map((index) => model.label(index)) };
  say(`${name}, ${percent(found.scores[found.index])}. ${remark ? `Look out: ${remark}.` : "Its map is shown."}`);
}

/** Draw the photo, and the map over it if there is one. */
function paint() {
  if (!photo) return;
  const canvas = element("picture");
  const opacity = element("opacity").valueAsNumber / 100;
  element("percent").textContent = `${element("opacity").value} %`;
  if (canvas.width !== photo.width) canvas.width = photo.width;
  if (canvas.height !== photo.height) canvas.height = photo.height;
  const seen = shown && seenBy(model.card.input, photo.width, photo.height);
  const drawn = shown ? overlay(photo, shown.levels, seen, opacity, model.card.evidence) : photo;
  canvas.getContext("2d", { willReadFrequently: true }).putImageData(drawn, 0, 0); // nothing else draws
  canvas.hidden = false;
  element("empty").hidden = true;
}

/** Drop what was found out about another photo, or by another model. */
function forget() {
  shown = null;
  element("list").replaceChildren();
  element("classes").hidden = true;
  element("view").hidden = true;
  delete element("picture").dataset.class;
  element("picture").setAttribute("aria-label", photo ? "The photo" : "No photo yet");
}

const radio = (index) => element("list").querySelector(`input[value="${index}"]`);

/** Return a class of the list: its name and score, to be chosen. */
function choice(index) {
  const row = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "class", value: index });
  const name = Object.assign(document.createElement("span"), { className: "name" });
  const score = Object.assign(document.createElement("span"), { className: "score" });
  row.className = "class";
  row.style.setProperty("--part", shown.scores[index]);
  name.textContent = model.label(index);
  score.textContent = percent(shown.scores[index]);
  row.append(input, name, score);
  return row;
}

/** Write a probability as a person reads it, never rounded to none or to certainty. */
function percent(score) {
  if (score > 0 && score < 0.0005) return "< 0.1 %";
  return score >= 0.9995 && score < 1 ? "> 99.9 %" : `${(100 * score).toFixed(1)} %`;
}

/** Return the class that a person means by a name or a number; null if there is none. */
function classNamed(text) {
  const wanted = text.trim().toLowerCase();
  const found = (model.card.labels ?? []).findIndex((label) => label.toLowerCase() === wanted);
  if (found >= 0) return found;
  return /^\d+$/.test(wanted) && Number(wanted) < shown.scores.length ? Number(wanted) : null;
}

function say(text, busy = false) {
  element("status").textContent = text;
  element("main").setAttribute("aria-busy", busy);
}

/** Show what is wrong; every second part between backquotes is a command. */
function complain(text) {
  const parts = text.split("`").map((part, index) => {
    if (index % 2 === 0) return part;
    return Object.assign(document.createElement("code"), { textContent: part, tabIndex: 0 });
  });
  element("error").replaceChildren(...parts);
  element("error").hidden = !text;
  element("error").scrollIntoView({ block: "nearest" });
}

/** Do something; an error is shown behind `what`. */
async function attempt(what, action) {
  complain("");
  try {
    await action();
  } catch (error) {
    say("");
    complain(`${what}: ${error.message}`);
  }
}

// The camera.

const booth = element("booth");
const video = element("video");

async function openCamera() {
  await attempt("The camera cannot be used", async () => {
    if (!navigator.mediaDevices) throw new Error("this browser gives none to this page. Choose a photo instead.");
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      const reasons = {
        NotAllowedError: "it is not allowed here. Allow it in the browser's settings, or choose a photo.",
        NotFoundError: "there is none. Choose a photo instead.",
        NotReadableError: "another program uses it, or it is broken.",
      };
      throw new Error(reasons[error.name] ?? error.message);
    }
    element("shoot").disabled = true;
    booth.showModal();
  });
}

video.addEventListener("loadeddata", () => {
  element("shoot").disabled = false;
  element("shoot").focus();
});
element("shoot").addEventListener("click", () => {
  const picture = pixelsOf(video, video.videoWidth, video.videoHeight);
  booth.close();
  setPhoto(picture);
});
element("leave").addEventListener("click", () => booth.close());
booth.addEventListener("close", () => {
  video.srcObject?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
});
element("camera").addEventListener("click", openCamera);

// Files, models, classes, opacity.

for (const id of ["photo", "model"]) {
  element(id).addEventListener("change", async ({ target }) => {
    await take(target.files);
    target.value = ""; // the same file may be chosen again
  });
}
document.addEventListener("paste", ({ clipboardData }) => take(clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files);
});
element("list").addEventListener("change", ({ target }) => explain(Number(target.value)));
element("classes").addEventListener("submit", (event) => {
  event.preventDefault();
  const { value } = element("other");
  const index = classNamed(value);
  complain(index === null ? `No class is called “${value}”.` : "");
  if (index !== null) explain(index);
});
element("opacity").valueAsNumber = 100 * OPACITY;
element("opacity").addEventListener("input", paint);

element("models").addEventListener("change", ({ target }) => openModel(offered[target.selectedIndex]));

async function begin() {
  element("stuck").remove();
  const beside = await contentOf("models/index.json").then(
    (json) => JSON.parse(new TextDecoder().decode(json)),
    () => [], // no models lie beside the page
  );
  for (const { name, path } of beside) offer({ name, read: () => contentOf(`models/${path}`) });
  if (offered.length) await openModel(offered[0]);
  else say("Open an explained model to begin.");
}

begin();
