"""Styles of overlays: how a map is drawn over its picture, as colors, as contours or as a mask."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageEnhance

from ..exceptions import InvalidArgument
from .colormaps import Colormap, Map, Pixels, Scale, colored, share_of_scale

StyleName = Literal["color", "contours", "mask"]
STYLES: tuple[StyleName, ...] = ("color", "contours", "mask")
TOP_PERCENT = 10.0

MAX_OPACITY = 0.75
OPACITY_POWER = 1.5  # above 1: the low values that a gradient has everywhere do not tint the whole picture
BASE_COLOR, BASE_BRIGHTNESS = 0.55, 0.62  # of the picture under the colors: shares of its saturation and brightness
UNSEEN_COLOR, UNSEEN_BRIGHTNESS = 0.0, 0.36  # of the parts outside the model's input, or outside the mask

NESTED = (1.0, 0.5, 0.25)  # the contours' shares of the top percent
CONTOUR_COLORS = (150, 205, 255)  # their steps of the color map
CONTOUR_WIDTH = 1 / 150  # share of the drawn map's short side: 1.5 px at 224
HALO_PX, HALO_OPACITY = 1.0, 0.6  # the dark edge that keeps a line visible on a bright picture


class Style(Protocol):
    """Draws a map over a picture."""

    def base(self, picture: Image.Image) -> Image.Image:
        """Return the picture as drawn where the map is 0."""
        return picture

    def unseen(self, picture: Image.Image) -> Image.Image:
        """Return the picture as drawn outside the part that the map covers."""

    def pixels(self, base: Image.Image, values: Map) -> Pixels:
        """Draw values [H, W] over the base, a picture of that size."""


@dataclass(frozen=True, slots=True, eq=False)
class Colors(Style):
    """The map's colors are blended with the picture, with the same opacity `alpha` everywhere.

    With None the picture is dimmed, and the opacity rises with the magnitude, up to `MAX_OPACITY` at full scale.
    """

    colormap: Colormap
    alpha: float | None
    scale: Scale | float | tuple[float, float]

    def base(self, picture: Image.Image) -> Image.Image:
        return _dimmed(picture, BASE_COLOR, BASE_BRIGHTNESS) if self.alpha is None else picture

    def unseen(self, picture: Image.Image) -> Image.Image:
        return _dimmed(picture, UNSEEN_COLOR, UNSEEN_BRIGHTNESS) if self.alpha is None else picture.copy()

    def pixels(self, base: Image.Image, values: Map) -> Pixels:
        return _blended(np.asarray(base), colored(values, self.scale, self.colormap), self._opacity(values))

    def _opacity(self, values: Map) -> Map:
        if self.alpha is not None:
            return np.full(values.shape, self.alpha)
        share = np.nan_to_num(np.abs(share_of_scale(values, self.scale)), nan=1.0)
        opacity: Map = MAX_OPACITY * share**OPACITY_POWER
        return opacity


@dataclass(frozen=True, slots=True, eq=False)
class Contours(Style):
    """Lines around the largest magnitudes: one at each of the levels, which ascend."""

    colormap: Colormap
    levels: Sequence[float]
    width_px: float

    def unseen(self, picture: Image.Image) -> Image.Image:
        return picture.copy()

    def pixels(self, base: Image.Image, values: Map) -> Pixels:
        pixels = np.array(base)
        for level, step in zip(self.levels, CONTOUR_COLORS, strict=False):
            outside_px = np.abs(_distance_px(values, level)) - self.width_px / 2
            pixels = _blended(pixels, np.zeros_like(pixels), HALO_OPACITY * _covered(outside_px - HALO_PX))
            colors = np.where((values < 0)[..., np.newaxis], self.colormap.below[step], self.colormap.above[step])
            pixels = _blended(pixels, colors, _covered(outside_px))
        return pixels


@dataclass(frozen=True, slots=True, eq=False)
class Mask(Style):
    """The picture where the magnitude reaches the level, gray and dark elsewhere. None: everywhere."""

    level: float | None = None

    def unseen(self, picture: Image.Image) -> Image.Image:
        return _dimmed(picture, UNSEEN_COLOR, UNSEEN_BRIGHTNESS)

    def pixels(self, base: Image.Image, values: Map) -> Pixels:
        dimmed = np.asarray(self.unseen(base))
        if self.level is None:
            return dimmed
        return _blended(np.asarray(base), dimmed, 1.0 - _covered(-0.5 - _distance_px(values, self.level)))


def top_levels(values: Map, top_percent: float) -> tuple[float, ...]:
    """Return the magnitudes that the top percent of the pixels reaches, and a half and a quarter of these pixels.

    There are none if no finite value differs from 0.
    """
    if not 0 < top_percent < 100:
        raise InvalidArgument(f"top_percent: got {top_percent}, expected more than 0 and less than 100")
    magnitudes = np.abs(values[np.isfinite(values)])
    positive = magnitudes[magnitudes > 0]
    if not positive.size:
        return ()
    levels = np.percentile(magnitudes, [100.0 - top_percent * share for share in NESTED])
    return tuple(float(each) for each in np.maximum(levels, positive.min()))


def _distance_px(values: Map, level: float) -> Map:
    """Return each pixel's distance from the contour at a level, to first order; negative below the level."""
    magnitudes = np.nan_to_num(np.abs(values), posinf=float(np.finfo(np.float32).max))
    padded = np.pad(magnitudes, 1, mode="edge")
    slope = np.hypot(padded[2:, 1:-1] - padded[:-2, 1:-1], padded[1:-1, 2:] - padded[1:-1, :-2]).astype(np.float64) / 2
    with np.errstate(over="ignore"):  # infinitely far, where the map is flat
        distance: Map = (magnitudes - level) / np.maximum(slope, np.finfo(np.float64).tiny)
    return distance


def _covered(outside_px: Map) -> Map:
    """Return the share of each pixel that an area covers, by the distance of the pixel's center from the area."""
    covered: Map = np.clip(0.5 - outside_px, 0.0, 1.0)
    return covered


def _blended(under: Pixels, over: Pixels, opacity: Map) -> Pixels:
    shares = opacity[..., np.newaxis]  # [H, W, 1]
    blended: Pixels = np.rint(under * (1.0 - shares) + over * shares).astype(np.uint8)
    return blended


def _dimmed(picture: Image.Image, color: float, brightness: float) -> Image.Image:
    return ImageEnhance.Brightness(ImageEnhance.Color(picture).enhance(color)).enhance(brightness)
