// Calls to the page's server. A failed call throws a Failure, which has the message of the API.

const HEADERS = { "x-sidelight-page": "1" };

export class Failure extends Error {
  constructor({ type = "Unknown", field = "", message, code = 2 }, status = 0) {
    super(message);
    Object.assign(this, { type, field, code, status });
  }
  get isAway() {
    return this.type === "Unavailable" || this.type === "PageAway";
  }
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: HEADERS });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure({ type: "PageAway", message: "the page's own server cannot be reached: start `sidelight page` again" });
  }
  if (response.ok) return response;
  const text = await response.text();
  let told;
  try {
    told = JSON.parse(text);
  } catch {
    told = { message: text || `status ${response.status}` };
  }
  throw new Failure(told, response.status);
}

export const getJson = async (path) => (await call(path)).json();
export const getBlob = async (path) => (await call(path)).blob();

export async function upload(file) {
  return (await call(`/pictures?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file })).json();
}

// Yield the events of a call as they come. Aborting the signal cancels the call on the Sidelight server.
export async function* events(path, options, signal) {
  const response = await call(path, { method: "POST", body: JSON.stringify(options), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = value.split("\n");
      rest.push(lines[0]);
      for (const line of lines.slice(1)) {
        yield JSON.parse(rest.join(""));
        rest = [line];
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure({ type: "PageAway", message: "the connection to the page's own server was lost" });
  }
}

export function pictureUrl(id, kind, window) {
  const query = window ? `?low=${window[0]}&high=${window[1]}` : "";
  return `/pictures/${encodeURIComponent(id)}/${kind}${query}`;
}
