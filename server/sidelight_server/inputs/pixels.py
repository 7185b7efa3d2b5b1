"""Pixels as a model takes them: channels converted, alpha laid over white, a window of gray values.

Files and arrays go the same way, so an array gives what a file of it would.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

_BECOMES = {1: (3,), 3: (1,), 4: (1, 3)}  # grey, RGB and RGBA


def can_become(channels: int, wanted: int) -> bool:
    """Say whether pixels of so many channels can be had in the wanted number of them."""
    return channels == wanted or wanted in _BECOMES.get(channels, ())


def in_channels(pixels: Pixels, wanted: int) -> Pixels:
    """Return uint8 `[H, W, C]` as `[H, W, wanted]`; the same array where it is that.

    Grey is repeated. The luma of colours is Pillow's: ITU-R 601-2, in integers.
    """
    if pixels.shape[2] == wanted:
        return pixels
    if pixels.shape[2] == 4:
        return in_channels(lay_over_white(pixels), wanted)
    if wanted == 1:
        return np.array(Image.fromarray(pixels).convert("L"))[..., np.newaxis]
    return np.repeat(pixels, wanted, axis=2)


def lay_over_white(rgba: Pixels) -> Pixels:
    """Return RGBA, `[H, W, 4]`, as RGB, `[H, W, 3]`."""
    wide = rgba.astype(np.uint16)
    colour, alpha = wide[..., :3], wide[..., 3:]
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def windowed(values: npt.NDArray[Any], low: float, high: float) -> Pixels:
    """Return values as pixels: 0 for those at or below `low`, 255 at or above `high`, linear and rounded between."""
    share = np.clip(values, low, high, dtype=np.float64)
    share -= low
    share *= 255
    share /= high - low
    pixels: Pixels = np.rint(share, out=share).astype(np.uint8)
    return pixels
