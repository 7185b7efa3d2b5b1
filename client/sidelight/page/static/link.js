// The view as the fragment of the address: whoever opens the link sees the same.

import { state } from "./store.js";

export function methodText({ method, options }) {
  const given = Object.entries(options).map(([name, value]) => `${name}=${pythonText(value)}`);
  return given.length ? `${method}(${given.join(", ")})` : method;
}

function pythonText(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  return /^[\w.+-]+$/.test(String(value)) ? String(value) : JSON.stringify(String(value));
}

// Read what methodText wrote. Values that contain commas are not written by this page.
export function parseMethod(text) {
  const [, method, inside] = /^\s*(\w+)\s*(?:\((.*)\))?\s*$/.exec(text) ?? [null, "gradient", ""];
  const options = {};
  for (const [, name, value] of (inside ?? "").matchAll(/(\w+)\s*=\s*("[^"]*"|[^,]+)/g)) {
    const bare = value.trim();
    if (bare === "None") options[name] = null;
    else if (bare === "True" || bare === "False") options[name] = bare === "True";
    else if (bare !== "" && !Number.isNaN(Number(bare))) options[name] = Number(bare);
    else options[name] = bare.replace(/^"|"$/g, "");
  }
  return { method, options };
}

export function writeLink() {
  const query = new URLSearchParams();
  const put = (name, value) => value !== null && value !== undefined && value !== "" && query.append(name, value);
  put("picture", state.picture);
  put("name", state.pictures.get(state.picture)?.name);
  put("model", state.model?.name);
  put("class", state.target);
  put("against", state.against);
  put("score", state.score);
  put("channels", state.channels);
  for (const pane of state.panes) put("map", methodText(pane));
  for (const [name, value] of Object.entries(state.view)) put(name, value);
  history.replaceState(null, "", `#${query}`);
}

export function readLink() {
  const query = new URLSearchParams(location.hash.slice(1));
  const index = (name) => (/^\d+$/.test(query.get(name) ?? "") ? Number(query.get(name)) : null);
  for (const [name, value] of Object.entries(state.view)) {
    const given = query.get(name);
    if (given === null) continue;
    if (typeof value === "number" && !Number.isNaN(Number(given))) state.view[name] = Number(given);
    if (typeof value === "boolean") state.view[name] = given === "true";
    if (typeof value === "string") state.view[name] = given;
  }
  return {
    picture: query.get("picture"), name: query.get("name"), model: query.get("model"),
    target: index("class"), against: index("against"),
    score: query.get("score"), channels: query.get("channels"), maps: query.getAll("map").slice(0, 4).map(parseMethod),
  };
}
