"""Resizes and crops pixels to the model's input size. Normalization follows on the device."""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from ..errors import InvalidArgument
from .pixels import Pixels, can_become, in_channels

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
OddMargin = Literal["round", "floor"]

RESIZES = 'an integer from 1 up, "HEIGHTxWIDTH", "exact" or "none"'
_SIDES = re.compile(r"[1-9]\d*x[1-9]\d*", re.ASCII)

# An image of 1 × 60,000 whose short side is resized to 256 would take 12 GB before it is cropped. Ordinary images stay
# far below this limit (50 MB of RGB). Above it the order of operations changes, and a byte may differ by 1.
MAX_SCALED_PIXELS = 1 << 24

MAX_SIDE = 2**31 - 1  # pixels; the limit of the answer's fields, for the original and the resized image

_WIDEST_SUPPORT = 3  # source pixels to each side that Lanczos, the widest filter, uses


@dataclass(frozen=True, slots=True)
class Geometry:
    """The model's input within the original image, in pixels: original → resized to scaled → cropped.

    `window` has the values that became black and white, for 16-bit and DICOM images.
    """

    original_height: int
    original_width: int
    scaled_height: int
    scaled_width: int
    crop_top: int
    crop_left: int
    crop_height: int
    crop_width: int
    window: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The preprocessing of a model: resize, center crop, and on the device (scaled − mean) / std.

    `resize` is the new length of the short side, keeping the aspect ratio (more if the crop would not fit); or
    "256x256", a height and width to resize to before the crop; or "exact", the input's own size; or "none". Pixels
    0 … 255 are scaled to `pixel_range`; `mean` and `std` have one number per channel, in units of `pixel_range`.
    `window` has the values of 16-bit and DICOM files that become pixels 0 and 255.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | str
    interpolation: Interpolation
    pixel_range: tuple[float, float] = (0.0, 1.0)
    window: tuple[float, float] | None = None  # None: the file's own, or all 16 bits
    odd_margin: OddMargin = "round"  # how half an odd margin is rounded, above and on the left: to even, or down

    def __post_init__(self) -> None:
        for field in ("channels", "height", "width"):
            if not _is_count(getattr(self, field)):
                raise ValueError(f"{field}: got {getattr(self, field)!r}, expected an integer from 1 up")
        for field in ("mean", "std"):
            values = getattr(self, field)
            if not isinstance(values, tuple) or len(values) != self.channels or not all(map(_is_finite, values)):
                raise ValueError(f"{field}: got {values!r}, expected a tuple of {self.channels} finite numbers")
        if min(self.std) <= 0:
            raise ValueError(f"std: got {self.std!r}, expected numbers above 0")
        self._check_resize()
        if self.odd_margin not in get_args(OddMargin):
            raise ValueError(f"odd_margin: got {self.odd_margin!r}, expected one of {', '.join(get_args(OddMargin))}")
        if self.interpolation not in get_args(Interpolation):
            known = ", ".join(get_args(Interpolation))
            raise ValueError(f"interpolation: got {self.interpolation!r}, expected one of {known}")
        if not _is_range(self.pixel_range):
            raise ValueError(f"pixel_range: got {self.pixel_range!r}, expected two finite numbers, the lower one first")
        if self.window is not None and not _is_range(self.window):
            raise ValueError(f"window: got {self.window!r}, expected two finite numbers, the lower one first")

    @property
    def mean_in_pixels(self) -> tuple[float, ...]:
        """`mean` in units of pixels 0 … 255, one number per channel."""
        low, high = self.pixel_range
        return tuple((each - low) * (255 / (high - low)) for each in self.mean)

    @property
    def std_in_pixels(self) -> tuple[float, ...]:
        """`std` in units of pixels 0 … 255, one number per channel."""
        low, high = self.pixel_range
        return tuple(each * (255 / (high - low)) for each in self.std)

    def fit(self, pixels: Pixels) -> tuple[Pixels, Geometry]:
        """Convert uint8 `[H, W, C]` to uint8 `[height, width, C]`; return it with its geometry.

        Gray and RGB are converted to each other, and alpha is composited over white, as for files. An array that needs
        no conversion or resizing is not copied: the result is the array itself or a view.
        """
        self._check(pixels)
        pixels = in_channels(pixels, self.channels)
        geometry = self.geometry(*pixels.shape[:2])
        scaled_height, scaled_width = geometry.scaled_height, geometry.scaled_width
        resample = Image.Resampling[self.interpolation.upper()]
        if scaled_height * scaled_width > max(MAX_SCALED_PIXELS, self.height * self.width):
            return _resize_crop(pixels, geometry, resample), geometry
        if (scaled_height, scaled_width) != pixels.shape[:2]:
            pixels = _resize(pixels, scaled_height, scaled_width, resample)
        return _crop(pixels, geometry), geometry

    def geometry(self, original_height: int, original_width: int) -> Geometry:
        """Return the geometry for an image of this size. Raises `InvalidArgument` if the input does not fit."""
        scaled_height, scaled_width = self._scale(original_height, original_width)
        if max(original_height, original_width, scaled_height, scaled_width) > MAX_SIDE:
            raise InvalidArgument(
                f"image: {original_height:,} × {original_width:,} pixels become {scaled_height:,} × {scaled_width:,} "
                f"once they are resized, expected at most {MAX_SIDE:,} along each side"
            )
        return Geometry(
            original_height=original_height,
            original_width=original_width,
            scaled_height=scaled_height,
            scaled_width=scaled_width,
            crop_top=self._start(scaled_height - self.height),
            crop_left=self._start(scaled_width - self.width),
            crop_height=self.height,
            crop_width=self.width,
            window=self.window,
        )

    def leaves(self, height: int, width: int, channels: int) -> bool:
        """Return whether an image of this size needs no change."""
        return channels == self.channels and (height, width) == (self.height, self.width) == self._scale(height, width)

    def _check(self, pixels: Pixels) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or 0 in pixels.shape:
            raise InvalidArgument(
                f"image: {pixels.dtype} {list(pixels.shape)}, expected uint8 [H, W, C], none of them 0"
            )
        if not can_become(pixels.shape[2], self.channels):
            raise InvalidArgument(
                f"image: {pixels.shape[2]} channels, the model takes {self.channels}; got {list(pixels.shape)}, and "
                "uint8 is [H, W, C]"
            )

    def _check_resize(self) -> None:
        if not is_resize(self.resize):
            raise ValueError(f"resize: got {self.resize!r}, expected {RESIZES}")
        if isinstance(self.resize, int) or self.resize in ("exact", "none"):
            return
        height, width = _sides(self.resize)
        if height < self.height or width < self.width or max(height, width) > MAX_SIDE:
            wanted = f"at least {self.height} × {self.width}, the input size, and at most {MAX_SIDE:,} along each side"
            raise ValueError(f"resize: got {self.resize!r}, expected {wanted}")

    def _start(self, margin: int) -> int:
        """Return the part of a margin, in pixels, that is above a crop or on its left."""
        return margin // 2 if self.odd_margin == "floor" else round(margin / 2)

    def _scale(self, height: int, width: int) -> tuple[int, int]:
        if self.resize == "exact":
            return self.height, self.width
        if isinstance(self.resize, str) and self.resize != "none":
            return _sides(self.resize)
        if isinstance(self.resize, str):
            if height < self.height or width < self.width:
                wanted = f"{self.height} × {self.width}"
                raise InvalidArgument(
                    f"image: {height} × {width} pixels, the model takes {wanted} or more: it never resizes"
                )
            return height, width
        if height <= width:
            short = max(self.resize, self.height, -(-self.width * height // width))
            return short, short * width // height
        short = max(self.resize, self.width, -(-self.height * width // height))
        return short * height // width, short


def is_resize(value: object) -> bool:
    """Return whether a value is valid for `resize`: one of `RESIZES`."""
    return _is_count(value) or value in ("exact", "none") or (isinstance(value, str) and bool(_SIDES.fullmatch(value)))


def _sides(resize: str) -> tuple[int, int]:
    """Return the height and the width in "256x256"."""
    height, _, width = resize.partition("x")
    return int(height), int(width)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_range(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_finite, value)) and value[0] < value[1]


def _crop(pixels: Pixels, geometry: Geometry) -> Pixels:
    top, left = geometry.crop_top, geometry.crop_left
    return pixels[top : top + geometry.crop_height, left : left + geometry.crop_width]


def _resize_crop(pixels: Pixels, geometry: Geometry, resample: Image.Resampling) -> Pixels:
    """Resize only the cropped part, so that the whole resized image is never allocated."""
    rows, top, bottom = _source(
        geometry.original_height, geometry.scaled_height, geometry.crop_top, geometry.crop_height
    )
    columns, left, right = _source(
        geometry.original_width, geometry.scaled_width, geometry.crop_left, geometry.crop_width
    )
    box = (left, top, right, bottom)
    return _resize(pixels[rows, columns], geometry.crop_height, geometry.crop_width, resample, box=box)


def _source(original: int, scaled: int, start: int, length: int) -> tuple[slice, float, float]:
    """Return the slice of one axis that a crop depends on, and the crop's edges relative to its start.

    Relative, because Pillow keeps a box in float32, which is too coarse for a crop far inside a long image.
    """
    step = original / scaled
    begin, end = start * step, (start + length) * step
    margin = _WIDEST_SUPPORT * max(step, 1.0) + 1
    first, last = max(0, math.floor(begin - margin)), min(original, math.ceil(end + margin))
    return slice(first, last), begin - first, min(end, original) - first


def _resize(
    pixels: Pixels,
    height: int,
    width: int,
    resample: Image.Resampling,
    *,
    box: tuple[float, float, float, float] | None = None,
) -> Pixels:
    n_rows, n_columns, channels = pixels.shape
    if box is None and n_rows * width > max(MAX_SCALED_PIXELS, n_rows * n_columns):
        # Pillow resizes rows first: an image 1 wide and millions high would become millions of long rows.
        pixels = _resize(pixels, height, n_columns, resample)
    if channels == 3:
        return np.array(Image.fromarray(pixels).resize((width, height), resample, box))
    # One channel at a time: with 2 or 4 channels Pillow treats the last as alpha and premultiplies the others.
    planes = [Image.fromarray(pixels[..., each]).resize((width, height), resample, box) for each in range(channels)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)  # [height, width, C]
