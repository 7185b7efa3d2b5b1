"""Overlays: a map drawn as a heat map, or laid over the picture that it explains."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from ..exceptions import InvalidArgument

Map = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]

PERCENTILE = 99.5  # a few pixels far above the rest would otherwise leave the map black
OVERLAY_ALPHA = 0.75
OVERLAY_SMOOTHING = 1 / 56  # of the map's short side: 4 px at 224
OPACITY_POWER = 1.5  # above 1, the faint floor that every gradient has does not tint the whole picture
BASE_COLOUR, BASE_BRIGHTNESS = 0.55, 0.62  # what is left of the picture's own under the heat
UNSEEN_COLOUR, UNSEEN_BRIGHTNESS = 0.0, 0.36  # and where the model did not look
BAND_PIXELS = 1 << 20  # that are drawn at once: of a large picture the floats alone would take gigabytes
NAN_COLOUR = (128, 128, 128)
SMOOTHING_REACH = 3.0  # standard deviations after which the Gaussian is cut

# Evenly spaced anchors, chosen in OKLCH so that lightness rises evenly from left to right. COLD and WARM are equally
# light at the same distance from their common zero: neither sign looks stronger than the other.
HEAT = (
    (7, 5, 18),
    (42, 4, 87),
    (103, 5, 126),
    (186, 0, 97),
    (241, 70, 52),
    (255, 157, 54),
    (255, 220, 79),
    (254, 252, 205),
)
COLD = ((12, 13, 18), (13, 44, 124), (25, 87, 210), (1, 153, 240), (88, 206, 248), (185, 244, 251))
WARM = ((12, 13, 18), (106, 0, 22), (187, 5, 34), (242, 89, 20), (255, 167, 70), (253, 230, 171))


def colour_scale(map_: Map) -> float:
    """Return the magnitude that is drawn brightest: the 99.5th percentile of the finite absolute values.

    Where that is 0 but the map is not, the largest magnitude; 0.0 for a map without a finite value other than 0.
    """
    magnitudes = np.abs(_checked(map_))
    magnitudes = magnitudes[np.isfinite(magnitudes)]
    if not magnitudes.any():
        return 0.0
    return float(np.percentile(magnitudes, PERCENTILE) or magnitudes.max())


def colourise(map_: Map, scale: float | None = None) -> Image.Image:
    """Draw a map `[H, W]` as an RGB picture of its own size.

    A map without negative values runs from dark to bright; one with them runs from dark at 0 to blue below and to red
    above. Magnitudes are clipped at `scale` (unset: `colour_scale(map_)`); NaN is mid-grey.
    """
    return Image.fromarray(_coloured(_checked(map_), scale, signed=is_signed(map_)))


def overlay(
    picture: Image.Image,
    map_: Map,
    *,
    alpha: float = OVERLAY_ALPHA,
    scale: float | None = None,
    smoothing_px: float | None = None,
) -> Image.Image:
    """Lay a map `[H, W]` over the dimmed picture it explains, the more opaque the greater the magnitude.

    The picture is resized to the map's size. `alpha` is the opacity at full scale. For the eye only, a smoothed copy of
    the map is drawn, since a gradient is grainy: `smoothing_px` is the standard deviation of a Gaussian (unset: 1/56 of
    the map's short side; 0: none). `scale` is measured on that copy. Neither the picture nor the map is changed.
    """
    values = _checked(map_)  # [H, W]
    if not 0 <= alpha <= 1:
        raise InvalidArgument(f"alpha: got {alpha}, expected 0 to 1")
    smoothed = _smooth(values, min(values.shape) * OVERLAY_SMOOTHING if smoothing_px is None else smoothing_px)
    base = overlay_base(picture, (values.shape[1], values.shape[0]))
    return Image.fromarray(_laid(base, smoothed, alpha=alpha, scale=scale, signed=is_signed(values)))


def overlay_part(picture: Image.Image, map_: Map, box: tuple[float, float, float, float]) -> Image.Image:
    """Lay a map `[H, W]` over the part of a picture that it covers, and return the whole picture at its own size.

    `box` is the part's left, top, right and bottom edge in pixels. Its colours are those of `overlay`; the rest of the
    picture is grey and darker.
    """
    values = _checked(map_)
    smoothed = _smooth(values, min(values.shape) * OVERLAY_SMOOTHING)
    scale, signed = colour_scale(smoothed), is_signed(values)
    heat = Image.fromarray(smoothed.astype(np.float32))
    left, right = _span(box[0], box[2], picture.width)
    top, bottom = _span(box[1], box[3], picture.height)
    drawn = _dimmed(picture, UNSEEN_COLOUR, UNSEEN_BRIGHTNESS)
    step, ratio = max(1, BAND_PIXELS // (right - left)), heat.height / (bottom - top)
    for begin in range(top, bottom, step):
        end = min(begin + step, bottom)
        rows = (0, (begin - top) * ratio, heat.width, min((end - top) * ratio, heat.height))
        band = np.asarray(heat.resize((right - left, end - begin), Image.Resampling.BILINEAR, rows))
        base = _dimmed(picture.crop((left, begin, right, end)), BASE_COLOUR, BASE_BRIGHTNESS)
        laid = _laid(base, band, alpha=OVERLAY_ALPHA, scale=scale, signed=signed)
        drawn.paste(Image.fromarray(laid), (left, begin))
    return drawn


def overlay_base(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the picture as an overlay shows it where the map is 0: RGB of `size` (W, H), paler and darker."""
    base = picture.convert("RGB")
    if base.size != size:
        base = base.resize(size, Image.Resampling.LANCZOS)
    return _dimmed(base, BASE_COLOUR, BASE_BRIGHTNESS)


def picture_of(array: npt.NDArray[Any]) -> Image.Image:
    """Make an RGB picture to look at from uint8 pixels `[H, W, C]` or a model-ready float array `[C, H, W]`.

    Pixels have 1, 3 or 4 channels; the fourth is opacity, laid over white. Of a float array the first three channels
    are shown, or the first alone where there are fewer, stretched so that the smallest value is black and the largest
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


def grey_of(values: npt.NDArray[Any], low: float, high: float) -> Pixels:
    """Return values as pixels that are black at `low` and below, white at `high` and above."""
    share = (np.clip(values, low, high, dtype=np.float64) - low) / (high - low)
    pixels: Pixels = np.rint(share * 255).astype(np.uint8)
    return pixels


def colour_bar(width: int, height: int, *, signed: bool = False) -> Image.Image:
    """Draw the colours of a map from 0 to full scale, left to right; signed, from minus to plus full scale."""
    ramp = np.linspace(-1.0 if signed else 0.0, 1.0, width)
    return Image.fromarray(_coloured(np.tile(ramp, (height, 1)), 1.0, signed=signed))


def is_signed(map_: Map) -> bool:
    """Tell whether a map has a negative value, and so is drawn in two colours."""
    return bool(np.any(map_ < 0))


def _dimmed(picture: Image.Image, colour: float, brightness: float) -> Image.Image:
    return ImageEnhance.Brightness(ImageEnhance.Color(picture.convert("RGB")).enhance(colour)).enhance(brightness)


def _span(first: float, last: float, length: int) -> tuple[int, int]:
    """Return the pixels nearest to a part of a side, as range would take them: at least one."""
    begin = min(round(first), length - 1)
    return begin, min(max(round(last), begin + 1), length)


def _laid(base: Image.Image, smoothed: Map, *, alpha: float, scale: float | None, signed: bool) -> Pixels:
    heat = _coloured(smoothed, scale, signed=signed)  # [H, W, 3]
    share = np.nan_to_num(np.abs(_share_of_scale(smoothed, scale)), nan=1.0)  # [H, W]
    opacity = alpha * share[..., np.newaxis] ** OPACITY_POWER  # [H, W, 1]
    blended: Pixels = np.rint(np.asarray(base, dtype=np.float64) * (1 - opacity) + heat * opacity).astype(np.uint8)
    return blended


def _coloured(values: Map, scale: float | None, *, signed: bool) -> Pixels:
    share = _share_of_scale(values, scale)  # [H, W]
    steps = np.rint(255 * np.nan_to_num(np.abs(share))).astype(np.intp)
    pixels: Pixels = np.where(
        (share < 0)[..., np.newaxis], _COLD[steps], (_WARM if signed else _HEAT)[steps]
    )  # [H, W, 3]
    pixels[np.isnan(share)] = NAN_COLOUR
    return pixels


def _share_of_scale(values: Map, scale: float | None) -> Map:
    scale = colour_scale(values) if scale is None else scale
    if not 0 <= scale < np.inf:
        raise InvalidArgument(f"scale: got {scale}, expected a finite number of 0 or more")
    clipped = np.clip(values, -scale, scale)  # before the division, which a tiny scale would overflow
    return clipped / scale if scale else clipped


def _smooth(values: Map, sigma_px: float) -> Map:
    if not 0 <= sigma_px < np.inf:
        raise InvalidArgument(f"smoothing_px: got {sigma_px}, expected a finite number of pixels, 0 or more")
    if sigma_px == 0:
        return values
    known = np.isfinite(values)
    # Dividing by the weight that fell on known pixels keeps edges, and what surrounds a NaN, as bright as they are.
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


def _checked(map_: Map) -> Map:
    if map_.ndim != 2 or 0 in map_.shape:
        raise InvalidArgument(f"map_: shape {list(map_.shape)}, expected [H, W] with at least one pixel")
    return map_.astype(np.float64)


def _table(anchors: tuple[tuple[int, int, int], ...]) -> Pixels:
    places = np.linspace(0.0, 1.0, len(anchors))
    steps = np.linspace(0.0, 1.0, 256)
    channels = [np.interp(steps, places, channel) for channel in zip(*anchors, strict=True)]
    table: Pixels = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)  # [256, 3]
    return table


_HEAT, _COLD, _WARM = _table(HEAT), _table(COLD), _table(WARM)
