// One line about the Sidelight server: is it there, which models, how busy. Asked every few seconds.

import { getJson } from "./api.js";
import { $, seconds, state, tell } from "./store.js";

const PERIOD_MS = 3000;
const RECENT_MS = 10_000;

export async function watchServer() {
  for (;;) {
    await askServer();
    await new Promise((done) => setTimeout(done, PERIOD_MS));
    if (document.hidden) await new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));
  }
}

export async function askServer() {
  const wasThere = state.server.reachable;
  try {
    const told = await getJson("/server");
    // While the server is away, what is known of its models stays.
    state.server = told.reachable ? told : { ...state.server, reachable: false, message: told.message };
  } catch (error) {
    state.server = { ...state.server, reachable: false, message: error.message };
  }
  renderStatus();
  tell("server", { isBack: state.server.reachable && !wasThere });
}

export function renderStatus() {
  const { server } = state;
  const model = server.models?.find((each) => each.name === state.model?.name) ?? server.models?.[0];
  const answer = state.active?.answer; // it tells the work of all callers, as it was then
  const backlog = answer && performance.now() - answer.at < RECENT_MS ? answer.timing.backlog_s : undefined;
  $("server").className = server.reachable ? (model?.state === "serving" ? "good" : "waiting") : "away";
  const parts = !server.reachable ? [`Server away: ${server.message ?? "not reached yet"}`] : [
    model ? `${model.name}, version ${model.version}` : "no model",
    model?.state !== "serving" ? model?.state : `${model.device}, ${model.precision}`,
    `answers in ${seconds(server.round_trip_s)}`,
    backlog === undefined ? null : `backlog ${seconds(backlog)}`,
    server.models.length > 1 ? `${server.models.length} models` : null,
  ];
  $("server-text").textContent = parts.filter(Boolean).join(" · ");
  $("server").title = `${state.setup?.address ?? ""} ${server.version ? `· Sidelight ${server.version}` : ""}`;
}
