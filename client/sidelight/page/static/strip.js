// The strip of pictures: adding them by files, folders or drop, and their predicted classes.

import { events, Failure, pictureUrl, upload } from "./api.js";
import { $, className, make, percent, state, tell, toast } from "./store.js";

const N_UPLOADS = 4; // at once
const items = new Map(); // list items by picture id
let classifying = null;
let notUploaded = [];

export function addPictures(pictures) {
  for (const picture of pictures) {
    if (state.pictures.has(picture.id)) continue;
    // The browser shows what it has itself; it asks the server for the pictures of the command line.
    const local = picture.file ? URL.createObjectURL(picture.file) : null;
    state.pictures.set(picture.id, { prediction: null, error: null, file: null, local, ...picture });
    items.set(picture.id, item(state.pictures.get(picture.id)));
  }
  $("thumbnails").append(...[...items.values()].filter((each) => !each.isConnected));
  $("count").textContent = state.pictures.size || "";
  $("empty").hidden = state.pictures.size > 0;
}

function item({ id, name, local }) {
  const ofServer = pictureUrl(id, "thumbnail");
  const image = make("img", { src: local ?? ofServer, alt: "", loading: "lazy", decoding: "async", width: 56, height: 56 });
  image.addEventListener("error", () => {
    if (image.getAttribute("src") === ofServer) image.replaceWith(make("span", { class: "broken", "aria-hidden": "true" }, "?"));
    else image.src = ofServer; // such as DICOM
  });
  const button = make("button", { type: "button", "data-id": id, tabindex: "-1", onclick: () => tell("select", id) },
    image, make("span", { class: "words" }, make("span", { class: "name", title: name }, name),
      make("span", { class: "class" }), make("span", { class: "number" })));
  return make("li", {}, button);
}

export function renderPicture(id) {
  const picture = state.pictures.get(id), button = items.get(id)?.firstElementChild;
  if (!button) return;
  const { prediction, error } = picture;
  const [name, number] = [button.querySelector(".class"), button.querySelector(".number")];
  button.classList.toggle("failed", Boolean(error));
  name.textContent = error ? error : prediction ? className(prediction.index, prediction.label) : "";
  name.title = name.textContent;
  number.textContent = prediction && !error ? percent(prediction.probability) : "";
}

export function renderSelection() {
  for (const [id, each] of items) {
    const button = each.firstElementChild, isCurrent = id === state.picture;
    button.tabIndex = isCurrent || (!state.picture && id === items.keys().next().value) ? 0 : -1;
    if (isCurrent) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  items.get(state.picture)?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

// Ask for the classes of all pictures that have none. What is shown gets its class with its map.
export async function classify() {
  classifying?.abort();
  const { signal } = (classifying = new AbortController());
  const open = [...state.pictures.values()].filter((each) => !each.prediction && !each.error && each.id !== state.picture);
  if (!open.length || !state.model) return;
  try {
    const asked = { pictures: open.map((each) => each.id), model: state.model.name };
    for await (const event of events("/classify", asked, signal)) {
      if (event.event === "error" && !event.picture) throw new Failure(event);
      const picture = state.pictures.get(event.picture);
      if (event.event === "error") picture.error = event.message;
      else picture.prediction = event.prediction;
      renderPicture(event.picture);
    }
  } catch (error) {
    if (!signal.aborted && !error.isAway) toast(error.message); // away: asked again once it is back
  }
}

export function forgetClasses() {
  for (const picture of state.pictures.values()) {
    Object.assign(picture, { prediction: null, error: null });
    renderPicture(picture.id);
  }
}

export async function addFiles(files) {
  const queue = [...files].filter((file) => !file.name.startsWith("."));
  const added = [], failed = [];
  let why = "";
  const worker = async () => {
    for (let file; (file = queue.shift()); ) {
      try {
        if (file.size > state.setup.max_file_bytes)
          throw new Failure({ message: `${file.name} has ${Math.ceil(file.size / 1048576)} MiB, expected at most ${state.setup.max_file_bytes / 1048576}` });
        const picture = { ...(await upload(file)), file };
        addPictures([picture]);
        added.push(picture.id);
        if (added.length === 1) tell("select", picture.id); // the first is explained while the rest is on its way
      } catch (error) {
        failed.push(file);
        why = error.message;
      }
    }
  };
  await Promise.all(Array.from({ length: N_UPLOADS }, worker));
  showNotUploaded(failed, why);
  if (added.length > 1) classify();
}

function showNotUploaded(failed, why) {
  notUploaded = failed;
  const names = failed.length === 1 ? failed[0].name : `${failed.length} files`;
  $("upload-problem").hidden = !failed.length;
  $("upload-problem").replaceChildren(make("p", {}, `${names} could not be added: ${why}`),
    make("button", { type: "button", onclick: () => addFiles(notUploaded) }, "Try again"),
    make("button", { type: "button", class: "quiet", onclick: () => showNotUploaded([], "") }, "Dismiss"));
}

export function listenToStrip() {
  for (const [button, input] of [["add-files", "files"], ["add-folder", "folder"]]) {
    $(button).addEventListener("click", () => $(input).click());
    $(input).addEventListener("change", () => {
      addFiles([...$(input).files]);
      $(input).value = "";
    });
  }
  $("thumbnails").addEventListener("keydown", (event) => {
    const ids = [...state.pictures.keys()], at = ids.indexOf(state.picture);
    const to = { ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: ids.length - 1 }[event.key];
    if (to === undefined || !ids[to]) return;
    event.preventDefault();
    tell("select", ids[to]);
    items.get(ids[to]).firstElementChild.focus();
  });
  listenToDrop();
}

function listenToDrop() {
  let depth = 0;
  const isFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragenter", (event) => isFiles(event) && ((depth += 1), ($("drop").hidden = false)));
  addEventListener("dragleave", (event) => isFiles(event) && ((depth -= 1), ($("drop").hidden = depth <= 0)));
  addEventListener("dragover", (event) => isFiles(event) && event.preventDefault());
  addEventListener("drop", async (event) => {
    if (!isFiles(event)) return;
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    const entries = [...event.dataTransfer.items].map((each) => each.webkitGetAsEntry?.()).filter(Boolean);
    addFiles(entries.length ? (await Promise.all(entries.map(filesOf))).flat() : event.dataTransfer.files);
  });
}

// The files of a dropped entry, and of a folder with all its folders.
async function filesOf(entry) {
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), found = [];
  for (;;) {
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) break;
    found.push(...some);
  }
  return (await Promise.all(found.map(filesOf))).flat();
}
