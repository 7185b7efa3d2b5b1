"""The answer: maps, what was predicted and explained, and everything that is needed to trust them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ._errors import SidelightError, from_code
from ._images import Batch
from ._picture import overlay
from ._types import Explained, Failure, Geometry, Prediction, Provenance, Timing

_DTYPES = {
    tensor_pb2.DATA_TYPE_UINT8: "u1",
    tensor_pb2.DATA_TYPE_FLOAT16: "<f2",
    tensor_pb2.DATA_TYPE_FLOAT32: "<f4",
}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """The answer for one batch of N examples.

    `maps` is float32, [N, H, W], or the signed [N, C, H, W] for `channels="none"`; a failed example's map is NaN and
    its entries in `predictions`, `explained` and `geometry` are None. Where the whole batch failed, which only
    `on_error="return"` lets through, `error` is set and there are no maps.
    """

    maps: NDArray[np.float32] = dataclasses.field(repr=False)
    predictions: tuple[Prediction | None, ...] = ()
    explained: tuple[Explained | None, ...] = ()
    geometry: tuple[Geometry | None, ...] = ()  # None also for floating arrays
    failures: tuple[Failure, ...] = ()
    probabilities: NDArray[np.float32] | None = dataclasses.field(default=None, repr=False)  # [N, K], if asked for
    provenance: Provenance | None = None
    timing: Timing | None = None
    convergence: tuple[None, ...] = ()  # None for methods of one row
    transport: str = "inline"
    final: bool = True
    index: int = 0  # the batch's position in a stream
    error: SidelightError | None = None
    _batch: Batch | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.maps)

    def picture(self, i: int) -> Image.Image:
        """Return what the model saw of example i, as an RGB picture of the map's size."""
        if self._batch is None or self.error is not None:
            raise self.error or ValueError("the answer does not hold its images")
        if error := next((each for each in self.failures if each.example == range(len(self))[i]), None):
            raise from_code(error.code, error.message)
        picture, geometry = self._batch.picture(i), self.geometry[i]
        return picture if geometry is None else _seen(picture, geometry)

    def map(self, i: int) -> NDArray[np.float32]:
        """Return the map of example i as [H, W], to be drawn: without channel reduction, the largest |value|."""
        map_: NDArray[np.float32] = self.maps[i]
        return map_ if map_.ndim == 2 else np.abs(map_).max(axis=0)

    def overlay(self, i: int) -> Image.Image:
        """Return what the model saw of example i with its map laid over it."""
        return overlay(self.picture(i), self.map(i))

    def save(self, folder: str | Path) -> None:
        """Write `maps.npy`, `answer.json` and one overlay for each example into a folder, which is made if need be."""
        if self.error is not None:
            raise self.error
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        np.save(path / "maps.npy", self.maps)
        (path / "answer.json").write_text(json.dumps(self.facts(), indent=2) + "\n", encoding="utf-8")
        failed = {failure.example for failure in self.failures}
        for i in range(len(self)):
            if i not in failed:
                self.overlay(i).save(path / f"{i:03}.png")

    def facts(self) -> dict[str, object]:
        """Return everything but the maps, as JSON can hold it."""
        return {
            "examples": [
                {
                    "prediction": prediction and dataclasses.asdict(prediction),
                    "explained": explained and dataclasses.asdict(explained),
                    "geometry": geometry and dataclasses.asdict(geometry),
                }
                for prediction, explained, geometry in zip(self.predictions, self.explained, self.geometry, strict=True)
            ],
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
            "provenance": self.provenance and dataclasses.asdict(self.provenance),
            "timing": self.timing and dataclasses.asdict(self.timing),
            "transport": self.transport,
        }


def read(message: pb.Attribution, batch: Batch, *, index: int = 0) -> Attribution:
    """Return the answer that a message holds, for the batch that was sent."""
    failed = {failure.example for failure in message.failures}
    examples = [None if i in failed else each for i, each in enumerate(message.examples)]
    return Attribution(
        maps=_array(message.maps),
        predictions=tuple(each and _prediction(each.prediction) for each in examples),
        explained=tuple(each and _explained(each.explained[0]) for each in examples),
        geometry=tuple(Geometry.of(each.geometry) if each and each.HasField("geometry") else None for each in examples),
        failures=tuple(Failure(each.example, each.code, each.message) for each in message.failures),
        probabilities=_array(message.probabilities) if message.HasField("probabilities") else None,
        provenance=Provenance.of(message.provenance),
        timing=Timing.of(message.timing),
        convergence=(None,) * len(examples),
        transport=pb.Transport.Name(message.transport).removeprefix("TRANSPORT_").lower(),
        final=message.final,
        index=index,
        _batch=batch,
    )


def failed(error: SidelightError, *, index: int) -> Attribution:
    """Return the answer of a batch that failed whole."""
    return Attribution(maps=np.empty((0, 0, 0), np.float32), index=index, error=error)


def _seen(picture: Image.Image, geometry: Geometry) -> Image.Image:
    # In one step: of a picture 1 × 60,000 the whole scaled one would take 12 GB.
    x, y = picture.width / geometry.scaled_width, picture.height / geometry.scaled_height
    left, top = geometry.crop_left * x, geometry.crop_top * y
    right, bottom = left + geometry.crop_width * x, top + geometry.crop_height * y
    box = (left, top, min(right, picture.width), min(bottom, picture.height))
    return picture.resize((geometry.crop_width, geometry.crop_height), Image.Resampling.BILINEAR, box)


def _array(tensor: tensor_pb2.Tensor) -> NDArray[np.float32]:
    array = np.frombuffer(tensor.data, _DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))
    if array.dtype == np.float32:
        return array  # a view on the message: read only, and not copied
    return array.astype(np.float32) * np.float32(tensor.scale or 1)


def _prediction(message: pb.Prediction) -> Prediction:
    return Prediction(message.index, message.label, message.probability)


def _explained(message: pb.Explained) -> Explained:
    return Explained(message.index, message.label, message.score, message.saturated)
