// The page: puts its parts together, and asks for a map whenever the question changes.

import { renderAbout } from "./about.js";
import { getJson } from "./api.js";
import { listenToClasses, renderClasses } from "./classes.js";
import { renderControls, showProblem } from "./controls.js";
import { readColormaps } from "./drawing.js";
import { readLink, writeLink } from "./link.js";
import { Pane } from "./pane.js";
import { askServer, renderStatus, watchServer } from "./status.js";
import { $, make, on, state, toast } from "./store.js";
import { addPictures, classify, forgetClasses, listenToStrip, renderPicture, renderSelection } from "./strip.js";
import { resetZoom, zoomBy, zoomToOwnSize } from "./viewport.js";

const MAX_PANES = 4;

function addPane(question) {
  const pane = new Pane(question);
  state.panes.push(pane);
  state.active = pane;
  $("panes").append(pane.element);
  renderPanes();
  return pane;
}

function renderPanes() {
  arrange();
  $("add-pane").disabled = state.panes.length >= MAX_PANES;
  for (const pane of state.panes) pane.render();
  renderControls();
  renderAbout();
}

function explainAll() {
  for (const pane of state.panes) pane.explain();
  writeLink();
}

async function loadModel(name) {
  state.model = await getJson(name ? `/model?name=${encodeURIComponent(name)}` : "/model");
  const { models = [] } = state.server;
  $("model").replaceChildren(...models.map((each) => make("option", { value: each.name }, each.name)));
  $("model").value = state.model.name;
  $("model").disabled = models.length < 2;
  state.modelVersion = models.find((each) => each.name === state.model.name)?.version;
}

async function changeModel(name) {
  await loadModel(name);
  Object.assign(state, { target: null, against: null });
  forgetClasses();
  renderControls();
  renderClasses();
  renderStatus();
  explainAll();
  classify();
}

// The server answers for the first time, or again, or its model was replaced.
async function onServer({ isBack }) {
  if (!state.server.reachable) return;
  const known = state.server.models?.find((each) => each.name === state.model?.name);
  try {
    if (!state.model) await loadModel(state.wanted.model).catch(() => loadModel());
    else if (known && known.version !== state.modelVersion) return void (await changeModel(state.model.name));
    else if (!isBack) return;
  } catch {
    return; // asked again in a moment
  }
  renderControls();
  renderStatus();
  for (const pane of state.panes) pane.explain(Boolean(pane.failure?.isAway));
  classify();
}

on("server", onServer);
on("select", (id) => {
  if (state.picture === id) return;
  Object.assign(state, { picture: id, target: null, against: null });
  resetZoom();
  renderSelection();
  explainAll();
  renderClasses();
  renderAbout();
});
on("question", () => {
  explainAll();
  showProblem();
});
on("answer", (pane) => {
  const { answer, failure } = pane, picture = state.pictures.get(answer?.picture ?? state.picture);
  if (picture && answer?.final) Object.assign(picture, { prediction: answer.prediction, error: null });
  else if (picture && failure && !failure.isAway && !answer && !/^(method|score|channels|target|against|layer)/.test(failure.field)) picture.error = failure.message;
  if (picture) renderPicture(picture.id);
  if (failure?.isAway) askServer();
  if (state.view.scale === "shared") drawAll();
  renderClasses();
  renderAbout();
  renderStatus();
  showProblem();
});
on("activate", (pane) => {
  state.active = pane;
  renderPanes();
});
on("remove", (pane) => {
  pane.remove();
  state.panes = state.panes.filter((each) => each !== pane);
  if (state.active === pane) state.active = state.panes[0];
  renderPanes();
  writeLink();
});
// Pane columns: as many as show the picture largest.
function arrange() {
  const [pane] = state.panes, place = $("panes"), frame = pane?.measure(), n = state.panes.length;
  if (!frame) return;
  const beside = pane.element.clientHeight - pane.frame.clientHeight, aspect = frame.pictureWidth / frame.pictureHeight;
  const heightWith = (columns) => {
    const width = (place.clientWidth - 12 * (columns - 1)) / columns, rows = Math.ceil(n / columns);
    return Math.min(width / aspect, Math.max(160, (place.clientHeight - 12 * (rows - 1)) / rows - beside));
  };
  const columns = Array.from({ length: n }, (_, i) => i + 1).reduce((a, b) => (heightWith(b) > heightWith(a) ? b : a));
  place.style.setProperty("--columns", columns);
}

on("loaded", () => {
  arrange();
  state.panes.forEach((pane) => pane.place());
});
let redraw;
on("viewport", () => {
  state.panes.forEach((pane) => pane.place());
  if (state.view.style !== "contours") return;
  clearTimeout(redraw); // lines are as wide on the screen, however large the picture is
  redraw = setTimeout(drawAll, 100);
});
on("partial", () => {
  if (state.view.scale === "shared") drawAll();
  renderClasses();
});

const drawAll = () => state.panes.forEach((pane) => pane.draw());

function listenToToolbar() {
  const { view } = state;
  $("colormap").replaceChildren(make("option", { value: "" }, "automatic"),
    ...Object.keys(state.setup.tables).map((name) => make("option", { value: name }, name.replaceAll("_", " "))));
  for (const name of ["style", "colormap", "opacity", "threshold", "top", "scale", "smooth"]) {
    const control = $(name), isBox = control.type === "checkbox", isRange = control.type === "range";
    if (isBox) control.checked = view[name];
    else control.value = view[name];
    control.addEventListener("input", () => {
      view[name] = isBox ? control.checked : isRange ? Number(control.value) : control.value;
      renderToolbar();
      drawAll();
      clearTimeout(listenToToolbar.timer);
      listenToToolbar.timer = setTimeout(writeLink, 200);
    });
  }
  const first = () => state.panes[0]?.measure();
  $("zoom-in").addEventListener("click", () => zoomBy(1.25, null, first()));
  $("zoom-out").addEventListener("click", () => zoomBy(0.8, null, first()));
  $("zoom-fit").addEventListener("click", resetZoom);
  $("zoom-own").addEventListener("click", () => first() && zoomToOwnSize(first()));
  listenToCompare();
  renderToolbar();
}

function renderToolbar() {
  const isColor = ["color", "even"].includes(state.view.style);
  $("opacity-label").hidden = state.view.style === "mask";
  $("threshold-label").hidden = !isColor;
  $("top-label").hidden = isColor;
  for (const name of ["opacity", "threshold", "top"])
    document.querySelector(`output[for="${name}"]`).textContent = name === "top" ? `${state.view.top} %` : `${Math.round(state.view[name] * 100)} %`;
}

function listenToCompare() {
  const show = (isBare) => {
    $("panes").classList.toggle("bare", isBare);
    $("compare").setAttribute("aria-pressed", String(isBare));
  };
  $("compare").addEventListener("pointerdown", () => show(true));
  for (const end of ["pointerup", "pointercancel", "blur"]) addEventListener(end, () => show(false));
  const isKey = (event) => (event.target === $("compare") && [" ", "Enter"].includes(event.key)) ||
    (event.key.toLowerCase() === "c" && !event.ctrlKey && !event.metaKey && !event.target.closest("input, select, textarea"));
  addEventListener("keydown", (event) => isKey(event) && show(true));
  addEventListener("keyup", (event) => isKey(event) && show(false));
}

function listenToTheme() {
  const apply = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
  };
  $("theme").value = localStorage.getItem("theme") ?? "";
  apply($("theme").value);
  $("theme").addEventListener("change", () => {
    localStorage.setItem("theme", $("theme").value);
    apply($("theme").value);
  });
}

function openLink(wanted) {
  if (state.setup.scores.includes(wanted.score)) state.score = wanted.score;
  if (state.setup.channels.includes(wanted.channels)) state.channels = wanted.channels;
  const known = wanted.maps.filter((each) => state.setup.byName[each.method]);
  for (const map of known.length ? known : [{ method: "gradient", options: {} }]) addPane(map);
  state.active = state.panes[0];
  if (state.pictures.has(wanted.picture)) Object.assign(state, { picture: wanted.picture, target: wanted.target, against: wanted.against });
  else if (wanted.picture) toast(`The link shows ${wanted.name ?? "a picture"}, which this page does not have. Add it to see the same.`);
  state.picture ??= state.pictures.keys().next().value ?? null;
}

async function start() {
  listenToTheme();
  state.setup = await getJson("/setup");
  state.setup.tables = readColormaps(state.setup.colormaps);
  state.setup.byName = Object.fromEntries(state.setup.methods.map((each) => [each.name, each]));
  state.wanted = readLink();
  addPictures(state.setup.pictures);
  listenToToolbar();
  listenToStrip();
  listenToClasses();
  openLink(state.wanted);
  renderPanes();
  renderSelection();
  renderClasses();
  new ResizeObserver(arrange).observe($("panes"));
  $("model").addEventListener("change", (event) => changeModel(event.target.value).catch((error) => toast(error.message)));
  $("link").addEventListener("click", async () => {
    writeLink();
    await navigator.clipboard.writeText(location.href).then(() => toast("The link is copied."), () => toast("Copy the address from the browser."));
  });
  $("add-pane").addEventListener("click", () => {
    const used = new Set(state.panes.map((pane) => pane.method));
    const next = ["smoothgrad", "grad_cam", "integrated_gradients", "gradient"].find((each) => !used.has(each)) ?? "gradient";
    addPane({ method: next, options: {} });
    explainAll();
    $("method-name").focus();
  });
  addEventListener("hashchange", () => location.reload()); // another link was pasted
  watchServer();
}

start().catch((error) => ($("server-text").textContent = error.message));
