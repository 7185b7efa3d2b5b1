"""Overlays: a map drawn over the picture that it explains."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from ..exceptions import InvalidArgument
from .colormaps import Colormap, Map, Pixels, checked, color_scale, colored, find_colormap, is_signed, share_of_scale

MAX_OPACITY = 0.75
OVERLAY_SMOOTHING = 1 / 56  # of the map's short side: 4 px at 224
OPACITY_POWER = 1.5  # above 1: the low values that a gradient has everywhere do not tint the whole picture
BASE_COLOR, BASE_BRIGHTNESS = 0.55, 0.62  # of the picture under the map: shares of its saturation and brightness
UNSEEN_COLOR, UNSEEN_BRIGHTNESS = 0.0, 0.36  # of the parts outside the model's input
BAND_PIXELS = 1 << 20  # drawn at once: for a large picture, the floats would take gigabytes
SMOOTHING_REACH = 3.0  # standard deviations after which the Gaussian is cut


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """How a map is blended with a picture.

    `alpha` is the same opacity everywhere: 0 is the picture, 1 the colored map. With None the picture is dimmed, and
    the map's opacity rises with its magnitude, up to `MAX_OPACITY` at full scale.
    """

    colormap: Colormap
    alpha: float | None
    scale: float | None

    def base(self, picture: Image.Image) -> Image.Image:
        """Return the picture as drawn where the map is 0."""
        return _dimmed(picture, BASE_COLOR, BASE_BRIGHTNESS) if self.alpha is None else picture

    def unseen(self, picture: Image.Image) -> Image.Image:
        """Return the picture as drawn outside the part that the map covers."""
        return _dimmed(picture, UNSEEN_COLOR, UNSEEN_BRIGHTNESS) if self.alpha is None else picture.copy()

    def pixels(self, base: Image.Image, values: Map) -> Pixels:
        """Blend values [H, W] with a picture of that size."""
        colors = colored(values, self.scale, self.colormap)  # [H, W, 3]
        opacity = self._opacity(values)
        blended: Pixels = np.rint(np.asarray(base, dtype=np.float64) * (1 - opacity) + colors * opacity).astype(
            np.uint8
        )
        return blended

    def _opacity(self, values: Map) -> Map | float:
        if self.alpha is not None:
            return self.alpha
        share = np.nan_to_num(np.abs(share_of_scale(values, self.scale)), nan=1.0)  # [H, W]
        opacity: Map = MAX_OPACITY * share[..., np.newaxis] ** OPACITY_POWER  # [H, W, 1]
        return opacity


def overlay(
    picture: Image.Image,
    map_: Map,
    *,
    colormap: str | None = None,
    alpha: float | None = None,
    scale: float | None = None,
    smoothing_px: float | None = None,
) -> Image.Image:
    """Draw a map `[H, W]` over the picture that it explains. The picture is resized to the map's size.

    `colormap` is one of `colormaps.NAMES`. `alpha`, 0 to 1, is the same opacity everywhere: 0 is the picture, 1 the
    colored map. With None the picture is dimmed, the map's opacity rises with its magnitude, and the map is smoothed,
    because gradients are grainy. `smoothing_px` is the standard deviation of the Gaussian; None is 1/56 of the map's
    short side, or 0 with an `alpha`. `scale` is the magnitude at full scale; None measures it on the smoothed map.
    Neither picture nor map is changed.
    """
    values = checked(map_)  # [H, W]
    smoothed = _smooth(values, _default_smoothing(values, alpha) if smoothing_px is None else smoothing_px)
    blend = Blend(find_colormap(colormap, signed=is_signed(values)), _checked_alpha(alpha), scale)
    base = blend.base(_fitted(picture, (values.shape[1], values.shape[0])))
    return Image.fromarray(blend.pixels(base, smoothed))


def overlay_part(
    picture: Image.Image,
    map_: Map,
    box: tuple[float, float, float, float],
    *,
    colormap: str | None = None,
    alpha: float | None = None,
) -> Image.Image:
    """Draw a map `[H, W]` over the part of a picture that it covers, and return the whole picture at its own size.

    `box` has the part's left, top, right and bottom edges in pixels. Colors are those of `overlay`. The rest of the
    picture is gray and darker, or unchanged with an `alpha`.
    """
    values = checked(map_)
    smoothed = _smooth(values, _default_smoothing(values, alpha))
    colors = find_colormap(colormap, signed=is_signed(values))
    blend = Blend(colors, _checked_alpha(alpha), color_scale(smoothed))
    heat, picture = Image.fromarray(smoothed.astype(np.float32)), picture.convert("RGB")
    left, right = _span(box[0], box[2], picture.width)
    top, bottom = _span(box[1], box[3], picture.height)
    drawn = blend.unseen(picture)
    step, ratio = max(1, BAND_PIXELS // (right - left)), heat.height / (bottom - top)
    for begin in range(top, bottom, step):
        end = min(begin + step, bottom)
        rows = (0, (begin - top) * ratio, heat.width, min((end - top) * ratio, heat.height))
        band = np.asarray(heat.resize((right - left, end - begin), Image.Resampling.BILINEAR, rows))
        base = blend.base(picture.crop((left, begin, right, end)))
        drawn.paste(Image.fromarray(blend.pixels(base, band)), (left, begin))
    return drawn


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


def gray_of(values: npt.NDArray[Any], low: float, high: float) -> Pixels:
    """Return gray pixels: black at `low` and below, white at `high` and above."""
    share = (np.clip(values, low, high, dtype=np.float64) - low) / (high - low)
    pixels: Pixels = np.rint(share * 255).astype(np.uint8)
    return pixels


def _checked_alpha(alpha: float | None) -> float | None:
    if alpha is not None and not 0 <= alpha <= 1:
        raise InvalidArgument(f"alpha: got {alpha}, expected 0 to 1, or None")
    return alpha


def _default_smoothing(values: Map, alpha: float | None) -> float:
    return min(values.shape) * OVERLAY_SMOOTHING if alpha is None else 0.0


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    picture = picture.convert("RGB")
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _dimmed(picture: Image.Image, color: float, brightness: float) -> Image.Image:
    return ImageEnhance.Brightness(ImageEnhance.Color(picture).enhance(color)).enhance(brightness)


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
    values = np.clip(np.nan_to_num(values, nan=low), low, high)
    shares = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    stretched: Pixels = np.rint(255 * shares).astype(np.uint8)
    return stretched


def _picture_of_pixels(pixels: Pixels) -> Image.Image:
    if pixels.shape[2] == 1:
        return Image.fromarray(pixels[..., 0]).convert("RGB")
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
