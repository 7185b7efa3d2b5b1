// A pane: one method's map over the picture, how far it is, and what went wrong.

import { events, Failure, pictureUrl, upload } from "./api.js";
import { drawColorbar, drawMap, readLayer } from "./drawing.js";
import { methodText } from "./link.js";
import { className, make, seconds, state, tell } from "./store.js";
import { listen, transformIn } from "./viewport.js";

export class Pane {
  constructor({ method, options }) {
    this.method = method;
    this.options = options;
    this.answer = null; // the newest event with a map
    this.asked = ""; // the question that `answer` or `failure` belongs to
    this.failure = null;
    this.isRunning = false;
    this.abort = null;
    this._build();
    new ResizeObserver(() => this.place()).observe(this.frame);
  }

  _build() {
    this.title = make("button", { type: "button", class: "pane-title", onclick: () => tell("activate", this) });
    this.close = make("button", { type: "button", class: "quiet", "aria-label": "Remove this map", onclick: () => tell("remove", this) }, "×");
    this.image = make("img", { alt: "", draggable: "false" });
    this.image.addEventListener("load", () => tell("loaded"));
    this.image.addEventListener("error", () => this._showPictureOfServer());
    this.canvas = make("canvas", { role: "img", "aria-label": "no map yet" });
    this.box = make("div", { class: "box" }, this.canvas);
    this.layers = make("div", { class: "layers" }, this.image, this.box);
    this.frame = make("div", {
      class: "frame", tabindex: "0", role: "group",
      "aria-label": "Picture with its map. Arrow keys move, plus and minus zoom, 0 fits, 1 is the picture's own size.",
    }, this.layers);
    this.bar = make("canvas", { class: "colorbar", "aria-hidden": "true" });
    this.ends = [make("span"), make("span"), make("span")];
    this.progress = make("progress", { "aria-label": "Rows computed", hidden: true });
    this.status = make("p", { class: "pane-status", role: "status" });
    this.button = make("button", { type: "button", onclick: () => (this.isRunning ? this.cancel() : this.explain(true)) });
    this.problem = make("p", { class: "problem", role: "alert", hidden: true });
    this.advice = make("p", { class: "advice", hidden: true });
    this.element = make("article", { class: "pane" },
      make("header", {}, this.title, this.close), this.frame,
      make("footer", {},
        make("div", { class: "scale" }, this.bar, make("div", { class: "ends" }, ...this.ends)),
        make("div", { class: "row" }, this.status, this.button), this.progress, this.problem, this.advice));
    listen(this.frame, () => this.measure());
  }

  question() {
    return {
      picture: state.picture, model: state.model?.name, target: state.target, against: state.against,
      score: state.score, channels: state.channels, method: methodText(this),
    };
  }

  // Ask the server, unless the answer is there. `again` asks in any case.
  async explain(again = false) {
    const question = this.question(), asked = JSON.stringify(question);
    if (!state.picture || !state.model || (!again && asked === this.asked)) return;
    this.abort?.abort();
    const abort = (this.abort = new AbortController());
    if (this.answer?.picture !== question.picture) this.answer = null;
    Object.assign(this, { asked, failure: null, isRunning: true, isCancelled: false, began: performance.now() });
    this.render();
    try {
      await this._read(question, abort.signal);
    } catch (error) {
      if (abort.signal.aborted) return;
      if (error instanceof Failure && error.status === 404 && (await this._restore(question.picture))) {
        this.asked = "";
        return void this.explain();
      }
      this.failure = error;
    }
    if (abort.signal.aborted) return;
    this.isRunning = false;
    this.render();
    tell("answer", this);
  }

  async _read(question, signal) {
    for await (const event of events("/explain", question, signal)) {
      if (signal.aborted) return;
      if (event.event === "error") throw new Failure(event);
      this.answer = { ...event, picture: question.picture, at: performance.now() };
      this.render();
      if (!event.final) tell("partial", this);
    }
  }

  // The page's server was started again: give it the picture once more, if it was added in this browser.
  async _restore(id) {
    const picture = state.pictures.get(id);
    if (!picture?.file || picture.isRestored) return false;
    picture.isRestored = true;
    return (await upload(picture.file).catch(() => null))?.id === id;
  }

  cancel() {
    this.abort?.abort();
    Object.assign(this, { isRunning: false, isCancelled: true });
    this.render();
  }

  remove() {
    this.abort?.abort();
    this.element.remove();
  }

  scale() {
    return this.answer ? readLayer(this.answer[state.view.smooth ? "smooth" : "raw"]) : null;
  }

  colormap() {
    const name = state.view.colormap || (this.answer?.signed ? "diverging" : "heat");
    return state.setup.tables[name] ?? state.setup.tables.heat;
  }

  render() {
    const changed = Object.entries(this.options).map(([name, value]) => name.replaceAll("_", " ") + (value === true ? "" : ` ${value}`));
    this.title.replaceChildren(methodTitle(this.method), make("span", { class: "dim" }, changed.join(", ")));
    this.title.setAttribute("aria-pressed", String(state.active === this));
    this.element.classList.toggle("active", state.active === this && state.panes.length > 1);
    this.close.hidden = state.panes.length < 2;
    this.element.setAttribute("aria-busy", String(this.isRunning));
    this._renderStatus();
    this.showPicture();
    this.draw();
  }

  _renderStatus() {
    const { answer, failure } = this;
    const rows = answer?.convergence?.rows, error = answer?.convergence?.error;
    const parts = [];
    if (this.isCancelled) parts.push("cancelled");
    else if (this.isRunning) parts.push(answer && !answer.final ? "improving" : "computing");
    if (answer && !failure) {
      if (rows) parts.push(`${rows} rows`);
      if (typeof error === "number") parts.push(`error ${error.toPrecision(2)}${{ true: ", met", false: ", missed" }[answer.convergence.is_met] ?? ""}`);
      if (answer.final && !this.isRunning) parts.push(seconds(answer.elapsed_s));
    }
    this.status.textContent = parts.join(" · ");
    this.button.textContent = this.isRunning ? "Cancel" : "Explain again";
    this.button.hidden = !(this.isRunning || this.isCancelled || failure);
    this.progress.hidden = !this.isRunning;
    const total = this.expectedRows();
    if (this.isRunning && rows && total) Object.assign(this.progress, { max: total, value: Math.min(rows, total) });
    else this.progress.removeAttribute("value");
    this.problem.hidden = !failure;
    this.problem.textContent = failure?.message ?? "";
    this.advice.hidden = !answer?.target?.advice || Boolean(failure);
    this.advice.textContent = answer?.target?.advice ?? "";
    this.canvas.hidden = !answer;
    this.frame.classList.toggle("stale", Boolean(failure || (this.isRunning && answer?.final)));
    if (answer) {
      const of = className(answer.target.index, answer.target.label);
      this.canvas.setAttribute("aria-label", `Map of ${of} by ${methodTitle(this.method)}`);
    }
  }

  expectedRows() {
    const option = (name) => this.options[name] ?? state.setup.byName[this.method]?.options.find((each) => each.name === name)?.default;
    if (option("tolerance")) return option("max_rows");
    return option("samples") ?? option("steps") ?? option("masks") ?? null;
  }

  showPicture() {
    const picture = state.pictures.get(state.picture), window = this.answer?.geometry?.window;
    const url = window || !picture?.local ? pictureUrl(state.picture, "picture", window) : picture.local;
    if (this.url === url || !picture) return;
    this.url = this.image.src = url;
  }

  // The browser cannot show every file that the server takes: DICOM and TIFF come as PNG.
  _showPictureOfServer() {
    const url = pictureUrl(state.picture, "picture", this.answer?.geometry?.window);
    if (this.url === url) this.image.removeAttribute("src");
    else this.url = this.image.src = url;
  }

  draw() {
    const { answer } = this, layer = this.scale(), { view } = state;
    const colors = view.style === "color" || view.style === "even";
    this.element.querySelector(".scale").hidden = !layer || !colors;
    this.frame.classList.toggle("dimmed", Boolean(layer) && view.style === "color");
    this.frame.classList.toggle("masked", Boolean(layer) && view.style === "mask");
    this.frame.classList.toggle("coarse", !view.smooth);
    this.frame.classList.toggle("has-map", Boolean(layer));
    this.place();
    if (!layer) return;
    const scale = view.scale === "shared" ? sharedScale() : layer;
    drawMap(this.canvas, { values: layer.values, shape: answer.shape, scale, colormap: this.colormap(), view, shownWidth: this.box.getBoundingClientRect().width || 1 });
    drawColorbar(this.bar, this.colormap(), answer.signed);
    const isTwoSided = answer.signed && this.colormap().diverging;
    const middle = scale.low ? "from its 1st percentile" : ""; // a large constant part is not drawn
    const ends = isTwoSided ? [-scale.high, 0, scale.high] : [scale.low, middle, scale.high];
    this.ends.forEach((span, n) => (span.textContent = typeof ends[n] === "number" ? short(ends[n]) : ends[n]));
  }

  // Lay the map over the part of the picture that the model saw.
  place() {
    const frame = this.measure();
    if (!frame) return;
    this.frame.style.setProperty("--aspect", frame.pictureWidth / frame.pictureHeight);
    const { left, top, scale } = transformIn(frame);
    this.layers.style.width = `${frame.pictureWidth}px`;
    this.layers.style.height = `${frame.pictureHeight}px`;
    this.layers.style.transform = `translate(${left}px, ${top}px) scale(${scale})`;
    this.image.classList.toggle("pixelated", scale > 4);
    const crop = cropOf(this.answer?.geometry, frame.pictureWidth, frame.pictureHeight);
    Object.assign(this.box.style, { left: `${crop.left}px`, top: `${crop.top}px`, width: `${crop.width}px`, height: `${crop.height}px` });
  }

  measure() {
    const { naturalWidth: pictureWidth, naturalHeight: pictureHeight } = this.image;
    const { clientWidth: width, clientHeight: height } = this.frame;
    if (!pictureWidth || !width || !height) return null;
    return { width, height, pictureWidth, pictureHeight, fit: Math.min(width / pictureWidth, height / pictureHeight) };
  }
}

const methodTitle = (name) => state.setup.byName[name]?.title ?? name;

function sharedScale() {
  const layers = state.panes.map((pane) => pane.scale()).filter(Boolean);
  return { low: Math.min(...layers.map((each) => each.low)), high: Math.max(...layers.map((each) => each.high)) };
}

export function cropOf(geometry, width, height) {
  if (!geometry) return { left: 0, top: 0, width, height };
  const x = width / geometry.scaled_width, y = height / geometry.scaled_height;
  return { left: geometry.crop_left * x, top: geometry.crop_top * y, width: geometry.crop_width * x, height: geometry.crop_height * y };
}

export function short(value) {
  return value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e4 ? String(Number(value.toPrecision(2))) : value.toExponential(1);
}
