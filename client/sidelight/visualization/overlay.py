"""Overlays: a map drawn over the picture that it explains."""

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..exceptions import InvalidArgument
from .colormaps import HIGH_PERCENTILE, Map, Pixels, Scale, checked, color_scale, find_colormap, is_signed
from .crop import Box
from .styles import CONTOUR_WIDTH, STYLES, TOP_PERCENT, Colors, Contours, Mask, Style, StyleName, top_levels

OVERLAY_SMOOTHING = 1 / 56  # share of the map's short side: 4 px at 224
BAND_PIXELS = 1 << 18  # drawn at once: for a large picture, the floats would take gigabytes
SMOOTHING_REACH = 3.0  # standard deviations after which the Gaussian is cut


def overlay(
    picture: Image.Image,
    map_: Map,
    box: Box | None = None,
    *,
    colormap: str | None = None,
    alpha: float | None = None,
    scale: float | tuple[float, float] | None = None,
    smoothing_px: float | None = None,
    percentile: float = HIGH_PERCENTILE,
    style: StyleName = "color",
    top_percent: float = TOP_PERCENT,
) -> Image.Image:
    """Draw a map `[H, W]` over the picture that it explains. Neither of them is changed.

    Without a `box`, the picture is resized to the map's size. With one, the map covers the part of the picture between
    these left, top, right and bottom edges in pixels, and the whole picture is returned at its own size. The part looks
    as without a box. The rest of the picture is gray and darker; with an `alpha`, or with contours, it is unchanged.

    The other options are those of `Attribution.overlay`, and two more. `smoothing_px` is the standard deviation of the
    Gaussian that smooths the map, because gradients are grainy; None is 1/56 of the map's short side, or 0 with an
    `alpha`. `scale` has the magnitudes at which colors begin and end, or only the end; None is `color_scale` of the
    smoothed map.
    """
    values = checked(map_)  # [H, W]
    smoothed = _smooth(values, _default_smoothing(values, alpha) if smoothing_px is None else smoothing_px)
    edges = None if box is None else _edges(box, picture.size)
    size = (values.shape[1], values.shape[0]) if edges is None else (edges[2] - edges[0], edges[3] - edges[1])
    scale = color_scale(smoothed, percentile) if scale is None else scale
    drawn = _style(style, values, smoothed, size, colormap=colormap, alpha=alpha, scale=scale, top_percent=top_percent)
    if edges is not None:
        return _draw_part(picture.convert("RGB"), smoothed, edges, drawn)
    return Image.fromarray(drawn.pixels(drawn.base(_fitted(picture, size)), smoothed))


def placed_map(map_: Map, box: Box, size: tuple[int, int]) -> Map:
    """Return a map `[H, W]` on the grid of a picture of this width and height, in a box as in `overlay`; 0 outside."""
    left, top, right, bottom = _edges(box, size)
    part = Image.fromarray(checked(map_).astype(np.float32))
    placed = np.zeros((size[1], size[0]))
    placed[top:bottom, left:right] = np.asarray(part.resize((right - left, bottom - top), Image.Resampling.BILINEAR))
    return placed


def smoothed_map(map_: Map) -> Map:
    """Return a map `[H, W]` as overlays draw it by default: smoothed, because gradients are grainy."""
    values = checked(map_)
    return _smooth(values, _default_smoothing(values, None))


def picture_of(array: npt.NDArray[Any]) -> Image.Image:
    """Return an RGB picture for display of uint8 pixels `[H, W, C]` or a model-ready float array `[C, H, W]`.

    Pixels have 1, 3 or 4 channels; the fourth is opacity, over white. For a float array, the first three channels are
    shown, or only the first if there are fewer. They are scaled so that the smallest value is black and the largest
    white.
    """
    if array.ndim == 3 and array.dtype == np.uint8 and array.shape[2] in (1, 3, 4):
        return _picture_of_pixels(array)
    if array.ndim == 3 and np.issubdtype(array.dtype, np.floating) and array.shape[0] > 0:
        shown = array[:3] if array.shape[0] >= 3 else array[:1]
        return _picture_of_pixels(np.moveaxis(_stretched(shown), 0, -1))
    raise InvalidArgument(
        f"array: {array.dtype} of shape {list(array.shape)}, "
        "expected uint8 [H, W, C] with 1, 3 or 4 channels, or float [C, H, W]"
    )


def over_white(picture: Image.Image) -> Image.Image:
    """Return an RGB picture: transparent pixels are drawn over white."""
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB")


def encoded(picture: Image.Image, kind: str, **options: int) -> bytes:
    """Return a picture as a file of a kind, "PNG" or "JPEG", with the options of Pillow."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def gray_of(values: npt.NDArray[Any], low: float, high: float) -> Pixels:
    """Return gray pixels: black at `low` and below, white at `high` and above."""
    share = (np.clip(values, low, high, dtype=np.float64) - low) / (high - low)
    pixels: Pixels = np.rint(share * 255).astype(np.uint8)
    return pixels


def _style(
    name: StyleName,
    values: Map,
    smoothed: Map,
    size: tuple[int, int],
    *,
    colormap: str | None,
    alpha: float | None,
    scale: Scale | float | tuple[float, float],
    top_percent: float,
) -> Style:
    """Return the style of an overlay that is drawn with a width and height in pixels."""
    if name not in STYLES:
        raise InvalidArgument(f"style: got {name!r}, expected one of {', '.join(STYLES)}")
    if alpha is not None and not 0 <= alpha <= 1:
        raise InvalidArgument(f"alpha: got {alpha}, expected 0 to 1, or None")
    if alpha is not None and name != "color":
        raise InvalidArgument(f'alpha: got {alpha} with style="{name}", expected None: only "color" has an opacity')
    colors = find_colormap(colormap, signed=is_signed(values))
    if name == "color":
        return Colors(colors, alpha, scale)
    levels = top_levels(smoothed, top_percent)
    return Contours(colors, levels, max(1.0, CONTOUR_WIDTH * min(size))) if name == "contours" else Mask(*levels[:1])


def _draw_part(picture: Image.Image, smoothed: Map, edges: tuple[int, int, int, int], drawn: Style) -> Image.Image:
    """Draw a map over the part of an RGB picture between these edges, in bands of its rows."""
    left, top, right, bottom = edges
    heat, sheet = Image.fromarray(smoothed.astype(np.float32)), drawn.unseen(picture)
    step, ratio = max(1, BAND_PIXELS // (right - left)), heat.height / (bottom - top)
    for begin in range(top, bottom, step):
        end = min(begin + step, bottom)
        first, last = max(top, begin - 1), min(end + 1, bottom)  # contours need the rows beside the band
        rows = (0, (first - top) * ratio, heat.width, min((last - top) * ratio, heat.height))
        band = np.asarray(heat.resize((right - left, last - first), Image.Resampling.BILINEAR, rows))
        pixels = drawn.pixels(drawn.base(picture.crop((left, first, right, last))), band)
        sheet.paste(Image.fromarray(pixels[begin - first : end - first]), (left, begin))
    return sheet


def _default_smoothing(values: Map, alpha: float | None) -> float:
    return min(values.shape) * OVERLAY_SMOOTHING if alpha is None else 0.0


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    picture = picture.convert("RGB")
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _edges(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return a box in whole pixels of a picture with a width and height."""
    (left, right), (top, bottom) = _span(box[0], box[2], size[0]), _span(box[1], box[3], size[1])
    return left, top, right, bottom


def _span(first: float, last: float, length: int) -> tuple[int, int]:
    """Round an interval to whole pixels, at least one, and return the ends as `range` takes them."""
    begin = min(round(first), length - 1)
    return begin, min(max(round(last), begin + 1), length)


def _smooth(values: Map, sigma_px: float) -> Map:
    if not 0 <= sigma_px < np.inf:
        raise InvalidArgument(f"smoothing_px: got {sigma_px}, expected a finite number of pixels, 0 or more")
    if sigma_px == 0:
        return values
    known = np.isfinite(values)
    # Dividing by the weight of the finite pixels keeps the brightness at edges and beside NaN.
    total, weight = (_blur(part, sigma_px) for part in (np.where(known, values, 0.0), known.astype(np.float64)))
    return np.where(known, total / np.where(known, weight, 1.0), values)


def _blur(values: Map, sigma_px: float) -> Map:
    for _ in range(2):  # along the columns, then, transposed, along the rows
        reach = min(int(np.ceil(SMOOTHING_REACH * sigma_px)), len(values) - 1)
        padded = np.pad(values, ((reach, reach), (0, 0)))
        offsets = np.arange(-reach, reach + 1)
        taps = np.exp(-0.5 * (offsets / sigma_px) ** 2)
        taps /= taps.sum()
        blurred = np.zeros_like(values)
        for tap, start in zip(taps, offsets + reach, strict=True):
            blurred += tap * padded[start : start + len(values)]
        values = blurred.T
    return values


def _stretched(array: Map) -> Pixels:
    values = array.astype(np.float64)
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 0.0)
    if low == high:
        return np.full(values.shape, 128, np.uint8)
    return gray_of(np.nan_to_num(values, nan=low), low, high)


def _picture_of_pixels(pixels: Pixels) -> Image.Image:
    if pixels.shape[2] == 1:
        return Image.fromarray(pixels[..., 0]).convert("RGB")
    return over_white(Image.fromarray(np.ascontiguousarray(pixels)))
