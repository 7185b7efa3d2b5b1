"""Color maps: the values of a map as colors.

A sequential color map draws magnitudes, from dark to bright; a diverging one also shows the sign.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..exceptions import InvalidArgument

Map = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]

HIGH_PERCENTILE = 99.5  # a few pixels far above the rest would otherwise leave the map black
LOW_PERCENTILE = 1.0
CONSTANT_SHARE = 0.2  # share of full scale: more would hide the rest of the map. A smoothed gradient has up to 0.15
MIN_RANGE = 1e-3  # share of full scale: less is drawn as one color, because it may be rounding
NAN_COLOR = (128, 128, 128)


class Scale(NamedTuple):
    """The magnitudes that the colors of a map begin and end with."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Colormap:
    """Colors [256, 3] of magnitudes from 0 to full scale, above 0 and below it."""

    above: Pixels
    below: Pixels

    @property
    def is_diverging(self) -> bool:
        """Whether negative values have different colors from positive ones."""
        return self.above is not self.below


def _table(anchors: str) -> Pixels:
    """Return 256 colors interpolated between evenly spaced ones."""
    colors = np.array([list(bytes.fromhex(each)) for each in anchors.split()], np.float64)  # [n, 3]
    positions, steps = np.linspace(0.0, 1.0, len(colors)), np.linspace(0.0, 1.0, 256)
    channels = [np.interp(steps, positions, channel) for channel in colors.T]
    table: Pixels = np.rint(np.stack(channels, axis=-1)).astype(np.uint8)  # [256, 3]
    return table


def _sequential(anchors: str) -> Colormap:
    table = _table(anchors)
    return Colormap(table, table)


def _diverging(anchors: str) -> Colormap:
    """Return a color map from one line of colors whose middle is zero."""
    colors = anchors.split()
    middle = len(colors) // 2
    return Colormap(_table(" ".join(colors[middle:])), _table(" ".join(colors[middle::-1])))


# "heat" and "diverging" are chosen in OKLCH so that lightness rises evenly with magnitude. The two halves of
# "diverging" are equally light at the same distance from their common zero: neither sign looks stronger.
# "blue_gold" grows lighter from one end to the other, so that signs differ in gray print, too.
# The others are anchors of matplotlib's color maps of those names: Smith and van der Walt, 2015 (viridis, magma);
# Nunez, Anderton and Renslow, 2018 (cividis); Moreland, 2009 (coolwarm).
_COLORMAPS = {
    "heat": _sequential("070512 2a0457 67057e ba0061 f14634 ff9d36 ffdc4f fefccd"),
    "viridis": _sequential(
        "440154 470d60 48186a 482374 472d7b 453781 424086 3e4989 3b528b 375b8d 33638d 2f6b8e 2c728e 297a8e 26828e "
        "23898e 21908c 1f978b 1f9f88 21a685 27ad81 31b57b 3ebc74 4dc26c 5cc863 6ece58 82d34d 95d840 aadc32 c0df25 "
        "d5e21a eae51a fde725"
    ),
    "magma": _sequential(
        "000004 030312 0a0822 130d34 1d1147 29115a 36106b 440f76 50127c 5d177f 691c81 762181 822681 8f2a81 9c2e7f "
        "a9337d b6367a c33b75 cf4070 db476a e65164 ee5c5e f46a5c f9785d fb8861 fd9668 fea571 feb47b fec287 fed194 "
        "fde0a1 fceeb0 fcfdbf"
    ),
    "cividis": _sequential(
        "00224e 00285b 002e6a 053371 1a386f 273e6e 32436d 3b496c 434e6c 4b546c 535a6d 5a5f6e 61656f 686a71 6f7073 "
        "767676 7c7c78 838179 8b8778 928d78 9a9376 a29975 aaa073 b3a670 bbad6d c3b369 ccba64 d4c15f ddc858 e6d051 "
        "efd748 f8df3c fee838"
    ),
    "diverging": _diverging("b9f4fb 58cef8 0199f0 1957d2 0d2c7c 0c0d12 6a0016 bb0522 f25914 ffa746 fde6ab"),
    "blue_gold": _diverging("001a57 153064 2d446f 465879 616c80 808080 9f9578 bbaa74 d8bf74 f3d57b ffed95"),
    "coolwarm": _diverging(
        "3b4cc0 445acc 4e68d8 5875e1 6282ea 6c8ff1 779af7 82a6fb 8db0fe 98b9ff a3c2fe aec9fc b8d0f9 c2d5f4 ccd9ed "
        "d5dbe5 dcdcdc e4d9d2 ebd3c6 f1cdb9 f4c5ad f7bba0 f7b194 f7a687 f49a7b f18d6f ec7f63 e57058 de614d d55042 "
        "cb3e38 c0282f b40426"
    ),
}
NAMES = tuple(_COLORMAPS)


def find_colormap(name: str | None, *, signed: bool) -> Colormap:
    """Return a color map by name; None is "diverging" for a map with negative values, else "heat"."""
    name = ("diverging" if signed else "heat") if name is None else name
    if not isinstance(name, str) or name not in _COLORMAPS:
        raise InvalidArgument(f"colormap: got {name!r}, expected one of {', '.join(NAMES)}")
    return _COLORMAPS[name]


def color_scale(map_: Map, percentile: float = HIGH_PERCENTILE) -> Scale:
    """Return the magnitudes that a map is drawn with; those that are not finite do not count.

    Colors end at this percentile of the magnitudes, or at the largest where that percentile is 0. They begin at
    0. If all values have one sign, and their 1st percentile is more than a fifth of full scale, they begin at that
    percentile: a large constant part, as RISE has it, would otherwise leave the map nearly one color.
    """
    if not 0 < percentile <= 100:
        raise InvalidArgument(f"percentile: got {percentile}, expected above 0 and at most 100")
    values = checked(map_)
    values = values[np.isfinite(values)]
    magnitudes = np.abs(values)
    if not magnitudes.any():
        return Scale(0.0, 0.0)
    low, high = (float(each) for each in np.percentile(magnitudes, [LOW_PERCENTILE, percentile]))
    high = high or float(magnitudes.max())
    has_one_sign = bool((values >= 0).all() or (values <= 0).all())
    is_constant_large = has_one_sign and low > CONSTANT_SHARE * high and high - low > MIN_RANGE * high
    return Scale(low if is_constant_large else 0.0, high)


def colorize(
    map_: Map, scale: float | tuple[float, float] | None = None, *, colormap: str | None = None
) -> Image.Image:
    """Draw a map `[H, W]` as an RGB picture of its own size.

    `scale` has the magnitudes at which colors begin and end, or only the end; None is `color_scale(map_)`. NaN is
    mid-gray.
    """
    values = checked(map_)
    return Image.fromarray(colored(values, scale, find_colormap(colormap, signed=is_signed(values))))


def color_bar(width: int, height: int, *, signed: bool = False, colormap: str | None = None) -> Image.Image:
    """Draw the colors of a map from 0 to full scale, left to right; signed, from minus to plus full scale."""
    ramp = np.linspace(-1.0 if signed else 0.0, 1.0, width)
    return Image.fromarray(colored(np.tile(ramp, (height, 1)), 1.0, find_colormap(colormap, signed=signed)))


def flat(map_: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Return a map as [H, W] for drawing. Without channel reduction, [C, H, W], it is the maximum |value|."""
    largest: Map = map_ if map_.ndim == 2 else np.abs(map_).max(axis=0)
    return largest


def is_signed(map_: Map) -> bool:
    """Return whether a map has a negative value."""
    return bool(np.any(map_ < 0))


def colored(values: Map, scale: float | tuple[float, float] | None, colormap: Colormap) -> Pixels:
    """Return the colors of values [H, W] as pixels [H, W, 3]."""
    share = share_of_scale(values, scale)  # [H, W]
    steps = np.rint(255 * np.nan_to_num(np.abs(share))).astype(np.intp)
    pixels: Pixels = np.where((share < 0)[..., np.newaxis], colormap.below[steps], colormap.above[steps])  # [H, W, 3]
    pixels[np.isnan(share)] = NAN_COLOR
    return pixels


def share_of_scale(values: Map, scale: float | tuple[float, float] | None) -> Map:
    """Return each value's position between the ends of the scale, 0 to 1, with the value's sign."""
    low, high = color_scale(values) if scale is None else _scale_of(scale)
    if low == high:
        return np.clip(values, 0.0, 0.0)  # keeps NaN
    magnitudes = np.clip(np.abs(values), low, high)  # before the division, which a tiny scale would overflow
    shares: Map = np.copysign((magnitudes - low) / (high - low), values)
    return shares


def _scale_of(scale: float | tuple[float, float]) -> Scale:
    low, high = scale if isinstance(scale, tuple) else (0.0, scale)
    if not 0 <= low <= high < np.inf:
        raise InvalidArgument(f"scale: got {scale}, expected a finite number of 0 or more, or two in ascending order")
    return Scale(low, high)


def checked(map_: Map) -> Map:
    """Return a map as float64. `InvalidArgument` if it is not [H, W], or empty."""
    if map_.ndim != 2 or 0 in map_.shape:
        raise InvalidArgument(f"map_: shape {list(map_.shape)}, expected [H, W] with at least one pixel")
    return map_.astype(np.float64)
