"""Rendering: draws the maps of an answer as PNG images, with the code that draws the client's overlays."""

import functools
import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.visualization.colormaps import HIGH_PERCENTILE, flat
from sidelight.visualization.crop import Box, crop_box, resized
from sidelight.visualization.overlay import overlay, picture_of

from ..domain import Answer, Array, Files, Request, TopK
from ..engine.engine import Engine
from ..engine.preparation.examples import input_shape, picture_order
from ..errors import InvalidArgument, SidelightError
from ..inputs.preprocessing import Geometry
from ..models.model import Model
from .enums import meaning

PNG_COMPRESSION = 1  # of 0 to 9: level 6 makes an overlay 5 to 10 % smaller and takes four times as long

# Memory. A PNG image may take 3 bytes per pixel, and is copied three times into the answer. A request's pictures are
# drawn one after another; Pillow and numpy then take up to this many bytes per pixel of the picture and of the map.
BYTES_PER_PNG_PIXEL = 12
BYTES_PER_DRAWN_PIXEL = 32
BYTES_PER_MAP_PIXEL = 192

_Drawn = TypeVar("_Drawn")

_STYLES: Mapping[pb.Rendering.Style.ValueType, bool] = {
    pb.Rendering.STYLE_OVERLAY: False,
    pb.Rendering.STYLE_HEATMAP: True,
}
_SIZES: Mapping[pb.Rendering.Size.ValueType, bool] = {pb.Rendering.SIZE_INPUT: False, pb.Rendering.SIZE_ORIGINAL: True}
COLORMAPS: Mapping[pb.Colormap.ValueType, str | None] = {
    number: name.removeprefix("COLORMAP_").lower() for name, number in pb.Colormap.items() if number
}


@dataclass(frozen=True, slots=True)
class Rendering:
    """How maps are drawn; see the message of this name."""

    is_heatmap: bool = False  # the map alone; otherwise over the image
    is_original: bool = False  # in the image's own size; otherwise in the map's
    colormap: str | None = None
    alpha: float | None = None
    percentile: float = HIGH_PERCENTILE

    def held_bytes(self, request: Request, model: Model, *, max_pixels: int) -> int:
        """Return an upper bound of the memory for a request's pictures.

        Raises `InvalidArgument` if the maps have more than `max_pixels`, or if the images cannot be shown.
        """
        _, height, width = input_shape(model, request.images)
        map_pixels = height * width
        if map_pixels > max_pixels:
            raise InvalidArgument(
                f"output.rendered: maps of {height:,} × {width:,} are {map_pixels:,} pixels, max_rendered_pixels is "
                f"{max_pixels:,}; draw them yourself"
            )
        pixels = self._pixels(request.images, max_pixels) or map_pixels
        n_pictures = request.n_examples * (request.target.k if isinstance(request.target, TopK) else 1)
        return (
            n_pictures * pixels * BYTES_PER_PNG_PIXEL
            + pixels * BYTES_PER_DRAWN_PIXEL
            + map_pixels * BYTES_PER_MAP_PIXEL
        )

    def _pixels(self, images: Files | Array, max_pixels: int) -> int:
        """Return an upper bound of the pixels of one picture; 0 if they are those of the map."""
        if isinstance(images, Files):
            return max_pixels if self.is_original else 0
        if images.dtype != np.uint8:
            return 0
        if not self.is_heatmap and images.shape[3] not in (1, 3, 4):
            raise InvalidArgument(
                f"output.rendered: an overlay needs images of 1, 3 or 4 channels, got {images.shape[3]}; request "
                "STYLE_HEATMAP"
            )
        return min(math.prod(images.shape[1:3]), max_pixels) if self.is_original else 0


def parse_rendering(output: pb.Output) -> Rendering | None:
    """Validate how maps are to be drawn; None if they are not. Raises `InvalidArgument`, naming the field."""
    if not output.HasField("rendered"):
        return None
    message, field = output.rendered, "output.rendered"
    is_heatmap = meaning(message.style, _STYLES, f"{field}.style", pb.Rendering.Style, unset=False)
    alpha = message.alpha if message.HasField("alpha") else None
    if alpha is not None and is_heatmap:
        raise InvalidArgument(f"{field}.alpha: got {alpha:g}, but a heat map has no image below; leave it unset")
    if alpha is not None and not 0 <= alpha <= 1:
        raise InvalidArgument(f"{field}.alpha: got {alpha:g}, expected 0 to 1")
    percentile = message.percentile if message.HasField("percentile") else HIGH_PERCENTILE
    if not 0 < percentile <= 100:
        raise InvalidArgument(f"{field}.percentile: got {percentile:g}, expected above 0 and at most 100")
    return Rendering(
        is_heatmap=is_heatmap,
        is_original=meaning(message.size, _SIZES, f"{field}.size", pb.Rendering.Size, unset=False),
        colormap=meaning(message.colormap, COLORMAPS, f"{field}.colormap", pb.Colormap, unset=None),
        alpha=alpha,
        percentile=percentile,
    )


async def with_pictures(
    answer: Answer, images: Files | Array, rendering: Rendering, *, engine: Engine, model: Model, caller: str
) -> Answer:
    """Return the answer with PNG images of its maps: `Answer.rendered`.

    `images` are the request's, which an answer no longer has. The pictures are drawn one after another, so that other
    requests' pictures come in between. An example whose image cannot be decoded a second time fails.
    """
    started_s = time.monotonic()
    renderer = _Renderer(answer, images, rendering, engine, model, caller)
    rendered: list[tuple[bytes, ...]] = []
    failures: dict[int, SidelightError] = {}
    for i in range(len(answer.explanations)):
        try:
            rendered.append(await renderer.pictures(i))
        except SidelightError as error:
            rendered.append(())
            failures[i] = error
    taken_s = time.monotonic() - started_s
    timing = answer.timing._replace(rendering_s=taken_s, total_s=answer.timing.total_s + taken_s)
    return replace(answer.failing(failures), rendered=tuple(rendered), timing=timing)


@dataclass(frozen=True, slots=True)
class _Frame:
    """The size of a picture, width first, the part of the image that it shows, and the part of it under the map."""

    size: tuple[int, int]
    shown: Box | None  # None: the whole image
    covered: Box | None  # None: the whole picture

    @classmethod
    def of(cls, geometry: Geometry, *, is_original: bool, max_pixels: int) -> "_Frame":
        original = geometry.original_width, geometry.original_height
        if not is_original:
            return cls((geometry.crop_width, geometry.crop_height), crop_box(original, geometry), None)
        size = within(original, max_pixels)
        return cls(size, None, crop_box(size, geometry))


def within(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """Return the largest size of this shape with at most `max_pixels`, and at least one pixel along each side."""
    width, height = size
    share = math.sqrt(max_pixels / (width * height))
    if share >= 1:
        return size
    width, height = max(1, int(width * share)), max(1, int(height * share))
    # A side that is kept at one pixel leaves less for the other.
    return min(width, max(1, max_pixels // height)), min(height, max(1, max_pixels // width))


@dataclass(frozen=True, slots=True)
class _Renderer:
    """Draws the maps of one answer."""

    answer: Answer
    images: Files | Array
    rendering: Rendering
    engine: Engine
    model: Model
    caller: str

    async def pictures(self, i: int) -> tuple[bytes, ...]:
        """Return PNG images of the maps of example i; none if it failed. Raises `SidelightError`."""
        explanation = self.answer.explanations[i]
        if explanation is None:
            return ()
        maps = self.answer.maps[i] if isinstance(self.answer.request.target, TopK) else self.answer.maps[i : i + 1]
        frame = None
        if explanation.geometry is not None:
            frame = _Frame.of(
                explanation.geometry,
                is_original=self.rendering.is_original,
                max_pixels=self.engine.settings.max_rendered_pixels,
            )
        picture = await self._picture(i, frame, size=(maps.shape[-1], maps.shape[-2]))
        covered = frame.covered if frame else None
        return tuple([await self._draw(_png, picture, each, covered, self.rendering) for each in maps])

    async def _picture(self, i: int, frame: _Frame | None, *, size: tuple[int, int]) -> Image.Image:
        """Return the picture below the map, in the frame's size, or in `size` for a floating array."""
        if self.rendering.is_heatmap:
            return Image.new("RGB", frame.size if frame else size)
        if not isinstance(self.images, Files):
            return await self._draw(_picture_of, self.images[i], frame)
        assert frame is not None  # noqa: S101  (every file has a geometry)
        order = picture_order(self.model, size=frame.size[::-1], box=frame.shown)
        return Image.fromarray(await self.engine.picture(self.images.files[i], order, self.caller))

    async def _draw(self, drawing: Callable[..., _Drawn], *arguments: object) -> _Drawn:
        return await self.engine.draw(functools.partial(drawing, *arguments), self.caller)


def _picture_of(array: Array, frame: _Frame | None) -> Image.Image:
    picture = picture_of(array)
    if frame is None or (frame.shown is None and frame.size == picture.size):
        return picture
    return resized(picture, frame.size, frame.shown)


def _png(picture: Image.Image, map_: NDArray[np.floating], covered: Box | None, rendering: Rendering) -> bytes:
    alpha = 1.0 if rendering.is_heatmap else rendering.alpha
    drawn = overlay(
        picture, flat(map_), covered, colormap=rendering.colormap, alpha=alpha, percentile=rendering.percentile
    )
    file = io.BytesIO()
    drawn.save(file, "PNG", compress_level=PNG_COMPRESSION)
    return file.getvalue()
