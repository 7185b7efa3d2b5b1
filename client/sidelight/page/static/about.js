// What is known about the active pane's map: prediction, target, timing, provenance, and downloads.

import { getBlob } from "./api.js";
import { cropOf } from "./pane.js";
import { $, className, make, percent, seconds, state, toast } from "./store.js";

export function renderAbout() {
  const pane = state.active, answer = pane?.answer, place = $("about");
  if (!answer?.final) return void place.replaceChildren(make("p", { class: "dim" }, answer ? "The map is not final yet." : "No map yet."));
  const isOpen = place.querySelector("details")?.open ?? false;
  place.replaceChildren(
    facts(mainFacts(answer)),
    make("div", { class: "row downloads", role: "group", "aria-label": "Download" },
      ...[["PNG", () => savePng(pane)], ["answer.json", () => saveFile(pane, "answer.json", ".json")], ["maps.npy", () => saveFile(pane, "maps.npy", ".npy")]]
        .map(([title, save]) => make("button", { type: "button", onclick: () => save().catch((error) => toast(error.message)) }, title))),
    make("details", { open: isOpen }, make("summary", {}, "Provenance"), facts(provenanceFacts(answer.provenance))),
  );
}

function mainFacts(answer) {
  const { prediction, target, timing, convergence, elapsed_s: elapsed } = answer;
  const against = target.against === null ? "" : ` rather than ${className(target.against, state.model?.labels[target.against] ?? "")}`;
  const stages = [["prepare", timing.prepare_s], ["queue", timing.queue_s + timing.admission_s], ["compute", timing.compute_s]];
  const given = {
    predicted: `${className(prediction.index, prediction.label)}, ${percent(prediction.probability)}`,
    explained: className(target.index, target.label) + against,
    score: Number(target.score).toPrecision(4),
    seen: cropText(answer.geometry),
    time: `${seconds(elapsed)}: ${stages.map(([name, value]) => `${name} ${seconds(value)}`).join(", ")}`,
  };
  if (target.saturated) given.warning = "saturated";
  else if (target.negligible) given.warning = "negligible";
  if (convergence) {
    given.rows = convergence.rows;
    if (typeof convergence.error === "number") given.error = convergence.error.toPrecision(2);
    if (typeof convergence.relative_completeness_error === "number") given.completeness = `off by ${percent(convergence.relative_completeness_error)}`;
  }
  return given;
}

// The part of the picture that the model gets; the rest is drawn dark.
function cropText(geometry) {
  if (!geometry) return "";
  const { original_width: width, original_height: height } = geometry, crop = cropOf(geometry, width, height);
  return `${Math.round(crop.width)} × ${Math.round(crop.height)} of ${width} × ${height} pixels`;
}

function provenanceFacts(provenance) {
  const { software, kernel_options: options, example_digests: examples, ...rest } = provenance;
  return {
    ...Object.fromEntries(Object.entries(rest).map(([name, value]) => [name.replaceAll("_", " "), value === true ? "yes" : value === false ? "no" : value])),
    "kernel options": options.join(", "), example: examples.join(", "),
    software: Object.entries(software).map(([name, version]) => `${name} ${version}`).join(", "),
  };
}

function facts(given) {
  const shown = Object.entries(given).filter(([, value]) => value !== "" && value !== null);
  return make("dl", {}, ...shown.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
}

function fileName(pane, ending) {
  const stem = (state.pictures.get(state.picture)?.name ?? "picture").replace(/\.[^.]*$/, "");
  return `${stem}-${pane.method}${ending}`;
}

async function saveFile(pane, name, ending) {
  save(await getBlob(`/answers/${pane.answer.id}/${name}`), fileName(pane, ending));
}

// The picture as it is shown, at its own size.
async function savePng(pane) {
  const { image, canvas, answer } = pane, { view } = state;
  const sheet = make("canvas", { width: image.naturalWidth, height: image.naturalHeight }), context = sheet.getContext("2d");
  const crop = cropOf(answer.geometry, sheet.width, sheet.height);
  context.drawImage(image, 0, 0);
  if (view.style === "color") {
    veil(context, "saturation", "rgb(128 128 128 / 0.45)", sheet);
    veil(context, "source-over", "rgb(0 0 0 / 0.38)", sheet);
  }
  context.imageSmoothingEnabled = view.smooth;
  context.imageSmoothingQuality = "high";
  context.drawImage(canvas, crop.left, crop.top, crop.width, crop.height);
  save(await new Promise((done) => sheet.toBlob(done, "image/png")), fileName(pane, ".png"));
}

function veil(context, operation, color, { width, height }) {
  context.globalCompositeOperation = operation;
  context.fillStyle = color;
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "source-over";
}

function save(blob, name) {
  const url = URL.createObjectURL(blob), anchor = make("a", { href: url, download: name });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
