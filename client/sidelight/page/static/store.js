// The page's state, and who wants to know when a part of it changes.

export const state = {
  setup: null, // what the page's server told at the start: methods, color maps, pictures
  server: { reachable: false }, // the newest word about the Sidelight server
  model: null, // { name, labels, layers }
  pictures: new Map(), // by id: { id, name, file, prediction, error }
  picture: null, // the id of the one that is shown
  target: null, // a class index; null is the predicted class
  against: null, // the class that is subtracted, or null
  score: "probability",
  channels: "max_abs",
  panes: [], // Pane objects, left to right
  active: null, // the pane whose method the controls show
  view: { style: "color", colormap: "", opacity: 0.75, threshold: 0, top: 10, scale: "own", smooth: true },
};

const listeners = new Map();

export function on(names, listener) {
  for (const name of names.split(" ")) {
    if (!listeners.has(name)) listeners.set(name, []);
    listeners.get(name).push(listener);
  }
}

// Topics: server, select, question, answer, partial, activate, remove, viewport.
export function tell(topic, detail) {
  for (const listener of listeners.get(topic) ?? []) listener(detail);
}

export const $ = (id) => document.getElementById(id);

// Create an element: attributes, then children. Text is always text, never markup.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== "string") element[name] = value;
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((each) => each !== null && each !== undefined));
  return element;
}

export function className(index, label) {
  return label || `class ${index}`;
}

export function percent(share) {
  const value = Number(share) * 100;
  if (!Number.isFinite(value)) return String(share);
  return value >= 99.95 && value < 100 ? ">99.9 %" : value > 0 && value < 0.05 ? "<0.1 %" : `${value.toFixed(1)} %`;
}

export function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

let toastTimer;
export function toast(text) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), 3000);
}
