// Draws maps onto canvases. Values, smoothing and scale come from the server; the color tables are Python's.

const CONTOUR_DETAIL = 4; // canvas pixels per map pixel
const CONTOUR_WIDTH = 2; // on the screen, in CSS pixels
const CONTOUR_COLORS = ["#ffdc4f", "#ff9d36", "#f14634"]; // of the top percent, a half and a quarter of them
const OPACITY_POWER = 1.5; // low values, which a gradient has everywhere, do not tint the whole picture
const VEIL = [12, 13, 16, 205]; // over what is not among the top areas

export function bytesOf(base64) {
  const letters = atob(base64), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i += 1) bytes[i] = letters.charCodeAt(i); // ten times as fast as from()
  return bytes;
}

export function readColormaps(colormaps) {
  return Object.fromEntries(
    Object.entries(colormaps).map(([name, each]) => [
      name, { above: bytesOf(each.above), below: bytesOf(each.below), diverging: each.diverging },
    ]),
  );
}

// Turn an event's base64 into numbers, once it is needed.
export function readLayer(layer) {
  layer.values ??= new Float32Array(bytesOf(layer.data).buffer);
  return layer;
}

// Draw a map [height, width]. `scale` has the magnitudes at which colors begin and end; `shownWidth` is in CSS pixels.
export function drawMap(canvas, { values, shape: [height, width], scale, colormap, view, shownWidth }) {
  const detail = view.style === "contours" ? CONTOUR_DETAIL : 1;
  if (canvas.width !== width * detail || canvas.height !== height * detail) {
    canvas.width = width * detail;
    canvas.height = height * detail;
  }
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (view.style === "contours") drawContours(context, values, [width, height], view, (CONTOUR_WIDTH * canvas.width) / shownWidth);
  else context.putImageData(new ImageData(pixelsOf(values, { scale, colormap, view }), width, height), 0, 0);
}

function pixelsOf(values, { scale, colormap, view }) {
  const pixels = new Uint8ClampedArray(values.length * 4);
  const level = view.style === "mask" ? topLevels(values, view.top)[0] : 0;
  const range = scale.high - scale.low || 1;
  for (let i = 0, at = 0; i < values.length; i += 1, at += 4) {
    const magnitude = Math.abs(values[i]);
    if (view.style === "mask") {
      if (!(magnitude >= level)) pixels.set(VEIL, at);
      continue;
    }
    if (Number.isNaN(magnitude)) {
      pixels.set([128, 128, 128, 255 * view.opacity], at);
      continue;
    }
    const share = Math.min(1, Math.max(0, (magnitude - scale.low) / range));
    if (share < view.threshold) continue;
    const table = values[i] < 0 ? colormap.below : colormap.above;
    const color = 3 * Math.round(255 * share);
    pixels[at] = table[color];
    pixels[at + 1] = table[color + 1];
    pixels[at + 2] = table[color + 2];
    pixels[at + 3] = 255 * view.opacity * (view.style === "even" ? 1 : share ** OPACITY_POWER);
  }
  return pixels;
}

// The magnitudes above which `top` percent of the pixels are, then a half and a quarter of them.
export function topLevels(values, top) {
  const sorted = Float32Array.from(values, (each) => (Number.isNaN(each) ? 0 : Math.abs(each))).sort();
  return [1, 2, 4].map((part) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * (1 - top / 100 / part)))]);
}

function drawContours(context, values, [width, height], view, line) {
  const magnitudes = Float32Array.from(values, (each) => (Number.isNaN(each) ? 0 : Math.abs(each)));
  context.lineCap = "round";
  context.globalAlpha = 0.25 + 0.75 * view.opacity;
  topLevels(values, view.top).forEach((level, n) => {
    const path = contour(magnitudes, width, height, level);
    for (const [color, times] of [["rgb(10 10 14 / 0.7)", 2.2], [CONTOUR_COLORS[n], 1]]) { // a dark edge: seen on any picture
      context.strokeStyle = color;
      context.lineWidth = times * line;
      context.stroke(path);
    }
  });
}

// Marching squares: the line on which the magnitudes equal the level, in canvas pixels.
function contour(values, width, height, level) {
  const path = new Path2D();
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? -Infinity : values[y * width + x]);
  const scaled = (each) => (each + 0.5) * CONTOUR_DETAIL;
  const cross = (x0, y0, x1, y1) => {
    const a = at(x0, y0), b = at(x1, y1);
    const share = Number.isFinite(a) && Number.isFinite(b) && a !== b ? (level - a) / (b - a) : 0.5;
    return [scaled(x0 + share * (x1 - x0)), scaled(y0 + share * (y1 - y0))];
  };
  for (let y = -1; y < height; y += 1) {
    for (let x = -1; x < width; x += 1) {
      const corners = [[x, y], [x + 1, y], [x + 1, y + 1], [x, y + 1]];
      const inside = corners.map(([cx, cy]) => at(cx, cy) >= level);
      const points = [];
      for (let side = 0; side < 4; side += 1) {
        if (inside[side] !== inside[(side + 1) % 4]) points.push(cross(...corners[side], ...corners[(side + 1) % 4]));
      }
      for (let n = 0; n + 1 < points.length; n += 2) {
        path.moveTo(...points[n]);
        path.lineTo(...points[n + 1]);
      }
    }
  }
  return path;
}

// Draw the colors from the low to the high end of a scale; for signs, from minus to plus.
export function drawColorbar(canvas, colormap, isSigned) {
  const width = (canvas.width = 256), context = canvas.getContext("2d");
  canvas.height = 1;
  const image = context.createImageData(width, 1);
  for (let x = 0; x < width; x += 1) {
    const share = isSigned && colormap.diverging ? (2 * x) / (width - 1) - 1 : x / (width - 1);
    const table = share < 0 ? colormap.below : colormap.above, color = 3 * Math.round(255 * Math.abs(share));
    image.data.set([table[color], table[color + 1], table[color + 2], 255], 4 * x);
  }
  context.putImageData(image, 0, 0);
}
