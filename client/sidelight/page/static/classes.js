// The most probable classes as bars: one click explains another class, or the difference of two.

import { $, className, make, percent, state, tell } from "./store.js";

let shownLabels = null;

export function renderClasses() {
  const answer = state.panes.map((pane) => pane.answer).find((each) => each?.classes.length && each.picture === state.picture);
  const list = $("classes");
  if (state.model?.labels !== shownLabels) {
    shownLabels = state.model?.labels;
    $("labels").replaceChildren(...(shownLabels ?? []).map((label) => make("option", { value: label })));
  }
  if (!answer) {
    if (!list.children.length || list.dataset.picture !== state.picture)
      list.replaceChildren(make("li", { class: "dim" }, state.picture ? "Classes appear with the first map." : "No picture yet."));
    return renderContrast();
  }
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  list.dataset.picture = state.picture;
  list.replaceChildren(...bars(answer));
  if (focused) list.querySelector(`[data-key="${focused}"]`)?.focus();
  renderContrast();
}

function bars(answer) {
  const entries = [...answer.classes];
  const chosen = state.target ?? answer.prediction.index;
  for (const index of [chosen, state.against])
    if (index !== null && !entries.some((each) => each.index === index))
      entries.push({ index, label: state.model?.labels[index] ?? "", probability: null });
  return entries.map(({ index, label, probability }) => {
    const isChosen = index === chosen, name = className(index, label);
    const share = probability === null ? 0 : Math.max(0, Math.min(1, Number(probability)));
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.setProperty("--share", share);
    return make("li", { class: isChosen ? "chosen" : index === state.against ? "against" : "" },
      make("button", {
        type: "button", class: "class", "aria-pressed": String(isChosen), "data-key": `class-${index}`, title: `${name} (${index})`,
        onclick: () => choose(index === answer.prediction.index ? null : index),
      }, bar, make("span", { class: "name" }, name), make("span", { class: "number" }, probability === null ? "" : percent(probability))),
      make("button", {
        type: "button", class: "versus", disabled: isChosen, "aria-pressed": String(index === state.against), "data-key": `against-${index}`,
        "aria-label": `Explain against ${name}`, title: `What speaks for the chosen class rather than ${name}?`,
        onclick: () => contrast(index === state.against ? null : index, chosen),
      }, "vs"));
  });
}

function renderContrast() {
  const label = (index) => className(index, state.model?.labels[index] ?? "");
  $("contrast").textContent = state.against === null || state.target === null ? ""
    : `The maps show what speaks for ${label(state.target)} rather than ${label(state.against)}.`;
}

function choose(index) {
  // A contrast needs a named class, also where that is the predicted one.
  state.target = index ?? null;
  state.against = null;
  tell("question");
  renderClasses();
}

function contrast(index, chosen) {
  state.against = index;
  if (index !== null) state.target = chosen;
  tell("question");
  renderClasses();
}

export function listenToClasses() {
  $("other-class").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = $("class-name").value.trim(), labels = state.model?.labels ?? [];
    if (!given) return;
    const exact = labels.findIndex((label) => label.toLowerCase() === given.toLowerCase());
    const index = exact >= 0 ? exact : /^\d+$/.test(given) ? Number(given) : labels.findIndex((label) => label.toLowerCase().includes(given.toLowerCase()));
    const problem = document.querySelector('[data-for="target"]');
    problem.hidden = index >= 0;
    if (index < 0) return void (problem.textContent = `target: got “${given}”, expected one of the model’s labels or a class index`);
    $("class-name").value = "";
    choose(index);
  });
}
