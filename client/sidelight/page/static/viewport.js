// Zoom and pan, shared by all panes: how many times larger than fitted, and which point of the picture is centered.

import { tell } from "./store.js";

const MAX_PIXEL = 40; // screen pixels per picture pixel
const STEP = 1.25;

export const viewport = { zoom: 1, x: 0.5, y: 0.5 };

export function resetZoom() {
  Object.assign(viewport, { zoom: 1, x: 0.5, y: 0.5 });
  tell("viewport");
}

export function zoomBy(factor, at = null, frame = null) {
  const limit = frame ? MAX_PIXEL / frame.fit : 64;
  const zoom = Math.min(Math.max(1, viewport.zoom * factor), Math.max(1, limit));
  if (at && frame) {
    // The picture's point under the pointer stays there.
    const before = pointAt(at, frame, viewport.zoom);
    viewport.zoom = zoom;
    const after = pointAt(at, frame, zoom);
    viewport.x += before[0] - after[0];
    viewport.y += before[1] - after[1];
  }
  viewport.zoom = zoom;
  clamp(frame);
  tell("viewport");
}

export function zoomToOwnSize(frame) {
  viewport.zoom = Math.max(1, 1 / (frame.fit * devicePixelRatio));
  clamp(frame);
  tell("viewport");
}

export function panBy(dx, dy, frame) {
  const scale = frame.fit * viewport.zoom;
  viewport.x -= dx / (frame.pictureWidth * scale);
  viewport.y -= dy / (frame.pictureHeight * scale);
  clamp(frame);
  tell("viewport");
}

// The transform that shows the picture in a frame.
export function transformIn(frame) {
  const scale = frame.fit * viewport.zoom;
  const left = frame.width / 2 - viewport.x * frame.pictureWidth * scale;
  const top = frame.height / 2 - viewport.y * frame.pictureHeight * scale;
  return { left, top, scale };
}

function pointAt([x, y], frame, zoom) {
  const scale = frame.fit * zoom;
  return [
    viewport.x + (x - frame.width / 2) / (frame.pictureWidth * scale),
    viewport.y + (y - frame.height / 2) / (frame.pictureHeight * scale),
  ];
}

// Keep the picture in its frame: no part of the frame stays empty while the picture could fill it.
function clamp(frame) {
  if (!frame) return;
  const scale = frame.fit * viewport.zoom;
  for (const [axis, inside, size] of [["x", frame.width, frame.pictureWidth], ["y", frame.height, frame.pictureHeight]]) {
    const half = inside / (2 * size * scale);
    viewport[axis] = half >= 0.5 ? 0.5 : Math.min(1 - half, Math.max(half, viewport[axis]));
  }
}

// Listen on a pane's frame: wheel, drag, pinch, double click and keys. `frameOf` measures it.
export function listen(element, frameOf) {
  const pointers = new Map();
  const place = (event) => {
    const box = element.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  element.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), place(event), frameOf());
  }, { passive: false });
  element.addEventListener("dblclick", (event) => {
    if (viewport.zoom > 1.01) resetZoom();
    else zoomBy(4, place(event), frameOf());
  });
  element.addEventListener("pointerdown", (event) => {
    element.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
  });
  element.addEventListener("pointermove", (event) => {
    const from = pointers.get(event.pointerId);
    if (!from) return;
    const to = place(event);
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      const apart = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]) || 1;
      zoomBy(apart(to) / apart(from), [(to[0] + other[0]) / 2, (to[1] + other[1]) / 2], frameOf());
    } else panBy(to[0] - from[0], to[1] - from[1], frameOf());
    pointers.set(event.pointerId, to);
  });
  for (const end of ["pointerup", "pointercancel"]) element.addEventListener(end, (event) => pointers.delete(event.pointerId));
  element.addEventListener("keydown", (event) => {
    const pan = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] }[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (pan) panBy(...pan, frameOf());
    else if (event.key === "+" || event.key === "=") zoomBy(STEP);
    else if (event.key === "-") zoomBy(1 / STEP);
    else if (event.key === "0") resetZoom();
    else if (event.key === "1") zoomToOwnSize(frameOf());
    else return;
    event.preventDefault();
  });
}
