"""Pictures of maps: colours for values, and a map laid over the picture that it explains.

For people's eyes only: a map is smoothed and clipped here to be seen, and never altered.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

Array = NDArray[Any]

PERCENTILE = 99.5  # of |values|: a few bright pixels would otherwise leave all others dark
SMOOTHING = 0.015  # of the shorter side: gradients are grainy, and the eye looks for regions
OPACITY = 0.92
SATURATION = 0.45
BRIGHTNESS = 0.62
NAN_COLOUR = (128, 128, 128)

# Colours at equal steps from 0 to the scale; lightness grows all the way.
_HEAT = ((5, 3, 20), (58, 9, 99), (133, 30, 110), (204, 60, 76), (243, 120, 35), (250, 192, 60), (254, 250, 200))
# From −scale through 0 to +scale; equally light on both sides.
_DIVERGING = (
    (140, 205, 255),
    (60, 130, 230),
    (25, 45, 110),
    (16, 16, 24),
    (115, 25, 35),
    (225, 70, 55),
    (255, 180, 120),
)


def colour_scale(map_: Array) -> float:
    """Return the value that is drawn brightest: the 99.5th percentile of |map|; 0 where nothing is but 0 and NaN."""
    values = np.abs(map_[np.isfinite(map_)])
    if values.size == 0:
        return 0.0
    return float(np.percentile(values, PERCENTILE)) or float(values.max())


def colourise(map_: Array, scale: float | None = None) -> Image.Image:
    """Return a map [H, W] in colours, from dark to bright; one with negative values in blue and red about dark."""
    values = _relative(map_, scale)
    signed = bool((values < 0).any())
    colours = _ramp(_DIVERGING if signed else _HEAT)
    position = (values + 1) / 2 if signed else values
    rgb = colours[np.round(position * 255).astype(np.uint8)]  # [H, W, 3]
    rgb[~np.isfinite(map_)] = NAN_COLOUR
    return Image.fromarray(rgb)


def overlay(
    picture: Image.Image, map_: Array, *, scale: float | None = None, smoothing: float = SMOOTHING
) -> Image.Image:
    """Return a picture, dimmed, with a map [H, W] glowing over it: the larger a value, the more opaque its colour.

    The map is smoothed to be looked at: `smoothing` is a Gaussian's standard deviation as a share of the shorter side.
    """
    height, width = map_.shape
    smooth = smoothed(map_, smoothing * min(height, width))
    base = picture.convert("RGB")
    if base.size != (width, height):
        base = base.resize((width, height), Image.Resampling.BILINEAR)
    base = ImageEnhance.Brightness(ImageEnhance.Color(base).enhance(SATURATION)).enhance(BRIGHTNESS)
    opacity = OPACITY * np.abs(_relative(smooth, scale)) ** 0.75  # below 1: middling values are seen too
    mask = Image.fromarray(np.round(255 * opacity).astype(np.uint8))
    return Image.composite(colourise(smooth, scale), base, mask)


def smoothed(map_: Array, sigma: float) -> Array:
    """Return a map [H, W] under a Gaussian blur of `sigma` pixels; NaN counts as 0."""
    values = np.nan_to_num(map_, nan=0.0, posinf=0.0, neginf=0.0).astype(np.float32)
    peak = float(np.abs(values).max(initial=0.0))
    if sigma <= 0 or peak == 0:
        return values
    radius = max(1, round(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        values = np.apply_along_axis(_convolved, axis, values, kernel)
    return values


def picture_of(array: Array) -> Image.Image:
    """Return uint8 pixels [H, W, C], or floats [C, H, W] scaled between their extremes, as an RGB picture."""
    if array.dtype != np.uint8:
        array = _to_bytes(np.moveaxis(array, 0, -1))  # [H, W, C]
    channels = array.shape[2]
    if channels == 4:
        image = Image.fromarray(np.ascontiguousarray(array))
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    shown = array[:, :, :3] if channels >= 3 else np.repeat(array[:, :, :1], 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(shown))


def _relative(map_: Array, scale: float | None) -> Array:
    """Return values as shares of the scale, clipped to −1…1; NaN as 0."""
    scale = colour_scale(map_) if scale is None else scale
    values = np.nan_to_num(map_, nan=0.0, posinf=0.0, neginf=0.0).astype(np.float64)
    return np.clip(values / scale, -1, 1) if scale > 0 else np.zeros_like(values)


def _ramp(anchors: tuple[tuple[int, int, int], ...]) -> NDArray[np.uint8]:
    places = np.linspace(0, 255, len(anchors))
    channels = [np.interp(np.arange(256), places, channel) for channel in zip(*anchors, strict=True)]
    return np.round(np.stack(channels, axis=1)).astype(np.uint8)  # [256, 3]


def _convolved(line: Array, kernel: Array) -> Array:
    radius = len(kernel) // 2
    return np.convolve(np.pad(line, radius, mode="edge"), kernel, mode="valid")


def _to_bytes(array: Array) -> NDArray[np.uint8]:
    finite = np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    spread = high - low
    return np.round((finite - low) * (255 / spread if spread > 0 else 0.0)).astype(np.uint8)


def colour_bar(width: int, height: int) -> Image.Image:
    """Return the colours of an unsigned map from 0, left, to its scale, right."""
    return colourise(np.tile(np.linspace(0, 1, width), (height, 1)), 1.0)
