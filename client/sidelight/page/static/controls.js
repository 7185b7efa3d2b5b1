// The controls of a method: made from what the server offers and from the options of the client's method classes.

import { $, make, state, tell } from "./store.js";

const WAIT_MS = 300; // after the last key, before the server is asked
let timer;

export function renderControls() {
  const pane = state.active, form = $("method");
  if (!pane || !state.setup) return;
  const described = state.setup.byName[pane.method];
  const offered = serverModel()?.methods;
  const methods = state.setup.methods.filter((each) => !offered?.length || offered.includes(each.name));
  const choose = select("method-name", methods.map((each) => [each.name, each.title]), pane.method, (value) => {
    Object.assign(pane, { method: value, options: {} });
    tell("question");
    renderControls();
    $("method-name").focus();
  });
  form.replaceChildren(
    field("Method", choose, "method"),
    make("p", { class: "hint" }, described?.summary ?? ""),
    described?.details ? make("details", {}, make("summary", {}, "Its options and its paper"), make("p", { class: "hint" }, described.details)) : null,
    make("div", { class: "options" }, ...(described?.options ?? []).map((option) => optionField(pane, option))),
    make("div", { class: "options" }, ...outputFields()),
  );
  showProblem();
}

function outputFields() {
  const scores = serverModel()?.scores;
  const words = (list) => list.map((each) => [each, each.replaceAll("_", " ")]);
  const offered = state.setup.scores.filter((each) => !scores?.length || scores.includes(each));
  return [
    field("Score", select("score", words(offered), state.score, (value) => ((state.score = value), tell("question"))), "score"),
    field("Channels", select("channels", words(state.setup.channels), state.channels, (value) => ((state.channels = value), tell("question"))), "channels"),
  ];
}

function optionField(pane, option) {
  const id = `option-${option.name}`, value = pane.options[option.name] ?? option.default;
  const set = (given) => {
    if (given === option.default) delete pane.options[option.name];
    else pane.options[option.name] = given;
    clearTimeout(timer);
    timer = setTimeout(() => tell("question"), WAIT_MS);
  };
  const title = option.name.replaceAll("_", " "), about = `method.${option.name}`;
  if (option.kind === "flag") {
    const box = make("input", { id, type: "checkbox", checked: Boolean(value), onchange: (event) => set(event.target.checked) });
    return make("div", { class: "field check" }, make("label", {}, box, " ", title), problemFor(about));
  }
  if (option.kind === "choice") {
    const choices = option.choices.map((each) => [each ?? "", each === null ? "default" : each.replaceAll("_", " ")]);
    return field(title, select(id, choices, value ?? "", (given) => set(given || null)), about);
  }
  if (option.kind === "layer") {
    const layers = [["", "automatic"], ...(state.model?.layers ?? []).map((each) => [each, each])];
    return field(title, select(id, layers, value ?? "", set), about);
  }
  const input = make("input", {
    id, type: "number", step: option.kind === "integer" ? "1" : "any", placeholder: option.optional ? "none" : "",
    oninput: (event) => {
      if (event.target.value !== "") set(Number(event.target.value));
      else if (option.optional) set(null);
    },
  });
  input.value = value ?? "";
  return field(title, input, about);
}

// Show the message of the API beside the control that it concerns; the pane shows it in any case.
export function showProblem() {
  const failure = state.active?.failure;
  for (const note of document.querySelectorAll("[data-for]")) {
    const name = note.dataset.for, about = failure?.field ?? "";
    const isMine = about === name || (name === "target" && /^(target|against|class)/.test(about)) ||
      (name === "method" && about.startsWith("method") && !document.querySelector(`[data-for="${CSS.escape(about)}"]`)) ||
      (name === "method.layer" && about === "layer");
    note.hidden = !failure || !isMine;
    note.textContent = isMine ? failure?.message ?? "" : "";
    const control = note.parentElement.querySelector("input, select");
    control?.toggleAttribute("aria-invalid", !note.hidden);
  }
}

export const serverModel = () => state.server.models?.find((each) => each.name === state.model?.name);

function field(title, control, about) {
  return make("div", { class: "field" }, make("label", { for: control.id }, title), control, problemFor(about));
}

const problemFor = (about) => make("p", { class: "problem", "data-for": about, role: "alert", hidden: true });

export function select(id, choices, value, change) {
  const element = make("select", { id, onchange: (event) => change(event.target.value) },
    ...choices.map(([name, title]) => make("option", { value: name }, title)));
  element.value = value;
  return element;
}
