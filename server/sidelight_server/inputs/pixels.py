"""Pixel conversions: number of channels, alpha over white, and a window of gray values.

Used for files and arrays alike, so an array gives the same result as a file with the same pixels.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import InvalidArgument

Pixels = npt.NDArray[np.uint8]

_BECOMES = {1: (3,), 3: (1,), 4: (1, 3)}  # gray, RGB and RGBA


class TooManyPixels(InvalidArgument):
    """A picture has more pixels than allowed. Raised before its pixels are decoded."""


def check_pixel_count(height: int, width: int, max_pixels: int) -> None:
    """Raise `TooManyPixels` if a file's image is larger than allowed."""
    if height * width > max_pixels:
        raise TooManyPixels(
            f"image file: {height:,} × {width:,} are {height * width:,} pixels, max_image_pixels is {max_pixels:,}"
        )


def can_become(channels: int, wanted: int) -> bool:
    """Return whether pixels of this number of channels can be converted to the wanted number."""
    return channels == wanted or wanted in _BECOMES.get(channels, ())


def in_channels(pixels: Pixels, wanted: int) -> Pixels:
    """Convert uint8 `[H, W, C]` to `[H, W, wanted]`; returns the same array if it has that shape.

    Gray is repeated. Colors become gray by Pillow's luma: ITU-R 601-2, in integers.
    """
    if pixels.shape[2] == wanted:
        return pixels
    if pixels.shape[2] == 4:
        return in_channels(lay_over_white(pixels), wanted)
    if wanted == 1:
        return np.array(Image.fromarray(pixels).convert("L"))[..., np.newaxis]
    return np.repeat(pixels, wanted, axis=2)


def lay_over_white(rgba: Pixels) -> Pixels:
    """Composite RGBA, `[H, W, 4]`, over white; return RGB, `[H, W, 3]`."""
    wide = rgba.astype(np.uint16)
    color, alpha = wide[..., :3], wide[..., 3:]
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def windowed(values: npt.NDArray[Any], low: float, high: float) -> Pixels:
    """Map values to pixels: at most `low` to 0, at least `high` to 255, linear and rounded in between."""
    share = np.clip(values, low, high, dtype=np.float64)
    share -= low
    share *= 255
    share /= high - low
    pixels: Pixels = np.rint(share, out=share).astype(np.uint8)
    return pixels
