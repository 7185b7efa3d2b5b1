"""The crop: the part of a picture that the model's input, and so the map, covers."""

from typing import Protocol

from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right and bottom edges in pixels


class Geometry(Protocol):
    """How a picture became the model's input, in pixels: resized to scaled, then cropped."""

    @property
    def scaled_height(self) -> int: ...
    @property
    def scaled_width(self) -> int: ...
    @property
    def crop_top(self) -> int: ...
    @property
    def crop_left(self) -> int: ...
    @property
    def crop_height(self) -> int: ...
    @property
    def crop_width(self) -> int: ...


def crop_box(size: tuple[int, int], geometry: Geometry) -> Box:
    """Return the crop's edges in the pixels of a picture of this width and height."""
    width, height = size
    x, y = width / geometry.scaled_width, height / geometry.scaled_height
    left, top = geometry.crop_left * x, geometry.crop_top * y
    right, bottom = left + geometry.crop_width * x, top + geometry.crop_height * y
    return left, top, min(right, width), min(bottom, height)


def cropped(picture: Image.Image, geometry: Geometry) -> Image.Image:
    """Return the part of a picture that the map covers, in the map's size."""
    # Crop and resize in one step: a picture of 1 × 60,000 pixels, scaled as a whole, would take 12 GB.
    return resized(picture, (geometry.crop_width, geometry.crop_height), crop_box(picture.size, geometry))


def resized(picture: Image.Image, size: tuple[int, int], box: Box | None = None) -> Image.Image:
    """Return a picture, or the part of it in a box, in another width and height."""
    return picture.resize(size, Image.Resampling.BILINEAR, box)
