"""`Attribution`, the answer: maps, predictions, explained targets and provenance."""

import dataclasses
import functools
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.images import EncodedBatch, WeakBatch
from .._inputs.tensors import Array
from ..exceptions import FailedPrecondition, InvalidArgument, SidelightError, from_code
from ..visualization.colormaps import HIGH_PERCENTILE, flat
from ..visualization.crop import crop_box, cropped
from ..visualization.overlay import overlay, placed_map
from ..visualization.styles import TOP_PERCENT, StyleName
from . import dicom, storage
from .dataframe import to_dataframe
from .display import answer_html, answer_text
from .example import ExampleAttribution
from .types import Convergence, ExplainedTarget, Failure, Geometry, Prediction, Provenance, Timing

if TYPE_CHECKING:
    import pandas as pd


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Attribution:
    """The answer for one batch of N examples.

    `maps` is float32 for every `map_dtype`: [N, H, W], or signed [N, C, H, W] for `channels="none"`. With a top-k
    target, a dimension k follows N, and each entry of `targets` is a tuple of k. The map of a failed example is NaN,
    and its entries in `predictions`, `targets`, `geometry` and `convergence` are None. The same holds for an example
    without a map yet, if `final` is False. If the whole batch failed and the call has `on_error="return"`, `error` is
    set and there are no maps.

    `answer[i]` and iteration return single examples as `ExampleAttribution`.
    """

    maps: NDArray[np.float32]
    predictions: tuple[Prediction | None, ...] = ()
    targets: tuple[ExplainedTarget | tuple[ExplainedTarget, ...] | None, ...] = ()
    geometry: tuple[Geometry | None, ...] = ()  # None also for floating arrays
    failures: tuple[Failure, ...] = ()
    probabilities: NDArray[np.float32] | None = None  # [N, K], if requested
    timing: Timing | None = None
    convergence: tuple[Convergence | None, ...] = ()  # None for methods of one row
    map_dtype: str = "float32"  # of the maps in the response
    transport: str = "inline"
    final: bool = True
    index: int = 0  # the batch's position in a stream
    id: str = ""  # of the batch: chosen by the caller, or generated
    error: SidelightError | None = None
    names: tuple[str | None, ...] = ()  # the path of each example that came from a file
    _batch: EncodedBatch | WeakBatch | None = None
    _provenance: pb.Provenance | None = None
    _baseline: Array | None = None  # the array given as the method's baseline

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, i: int) -> ExampleAttribution:
        index = operator.index(i)
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index}: the answer has {len(self)} examples")
        return ExampleAttribution(self, index % len(self))

    def __iter__(self) -> Iterator[ExampleAttribution]:
        return (ExampleAttribution(self, i) for i in range(len(self)))

    def __repr__(self) -> str:
        return f"Attribution({answer_text(self)})"

    def _repr_html_(self) -> str:
        return answer_html(self)

    def picture(self, i: int) -> Image.Image:
        """Return the input of example i, resized and cropped as for the model, as an RGB picture of the map's size."""
        picture, geometry = self._original(i), self.geometry[i]
        return picture if geometry is None else cropped(picture, geometry)

    def heatmap(self, i: int, *, k: int = 0) -> NDArray[np.float32]:
        """Return the map of example i as [H, W] for drawing. Without channel reduction, it is the maximum |value|.

        `k` selects one of the classes of a top-k target.
        """
        map_: NDArray[np.float32] = self.maps[i]
        if self.is_top_k:
            map_ = map_[k]
        elif k != 0:
            raise IndexError(f"k: got {k}, but the target is not top-k: each example has one map")
        return flat(map_)

    @property
    def provenance(self) -> Provenance | None:
        """What is needed to recompute the answer, except the images; None if the whole batch failed."""
        return None if self._provenance is None else Provenance.of(self._provenance)

    @property
    def is_top_k(self) -> bool:
        return self._provenance is not None and self._provenance.target.WhichOneof("target") == "top_k"

    def overlay(
        self,
        i: int,
        *,
        k: int = 0,
        colormap: str | None = None,
        alpha: float | None = None,
        percentile: float = HIGH_PERCENTILE,
        original: bool = False,
        style: StyleName = "color",
        top_percent: float = TOP_PERCENT,
    ) -> Image.Image:
        """Draw the map of example i over its picture; `k` as in `heatmap`.

        `colormap` is "heat", "viridis", "magma" or "cividis", which draw magnitudes, or "diverging", "blue_gold" or
        "coolwarm", which also show signs. None is "diverging" for a map with negative values, else "heat". `alpha`, 0
        to 1, is the same opacity everywhere: 0 is the picture, 1 the colored map. With None the picture is dimmed, the
        map is smoothed, and its opacity rises with its magnitude. Colors end at `percentile` of the map's magnitudes.
        With `original` the whole picture is drawn at its own size; without an `alpha`, the parts that were cropped away
        are darker.

        `style` "contours" draws lines around the `top_percent` of the pixels with the largest magnitudes, a half and a
        quarter of them; "mask" leaves these pixels as they are, and the others gray and dark.
        """
        geometry = self.geometry[i] if original else None
        picture = self.picture(i) if geometry is None else self._original(i)
        return overlay(
            picture,
            self.heatmap(i, k=k),
            None if geometry is None else crop_box(picture.size, geometry),
            colormap=colormap,
            alpha=alpha,
            percentile=percentile,
            style=style,
            top_percent=top_percent,
        )

    def save(self, folder: str | Path, *, original: bool = False, overwrite: bool = False) -> None:
        """Write `maps.npy`, `answer.json` and one overlay per map into a folder, which is created if it is missing.

        `original` is that of `overlay`. An array that was given as a baseline is written to `baseline.npy`.
        `sidelight replay` reads these files. An overlay that cannot be drawn is left out, and `overlay_missing` in
        `answer.json` has the reason: a DICOM file without `sidelight[dicom]` installed, or an answer that no longer has
        its images. `answer.json` is written last, so that a folder with one is complete.

        `AlreadyExists` if the folder has an answer and `overwrite` is False.
        """
        if self.error is not None:
            raise self.error
        storage.write(
            self,
            Path(folder),
            provenance=self._provenance,
            baseline=self._baseline,
            draw=functools.partial(self._overlays, original=original),
            overwrite=overwrite,
        )

    def save_dicom(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write the maps of DICOM images as DICOM objects for clinical viewers, and return their paths.

        `000-map.dcm` is a Parametric Map: float32 values on the grid of the source image, 0 where the model did not
        look, the source's position in the patient, and the range of values to show. `000-overlay.dcm` is a Secondary
        Capture of the overlay in color; a map of floating-point values cannot have colors of its own. A source without
        a frame of reference, such as a plain radiograph, gets only the overlay, because a Parametric Map must have one.

        All objects are in the source's study, refer to it, repeat its attributes of the patient, and have the
        provenance in the header. Failed examples are left out. With a top-k target, `000-1-map.dcm` is that of the
        second class. Needs `sidelight[dicom]`. `InvalidArgument` for an example that is not a DICOM image of one frame,
        `AlreadyExists` if a file exists and `overwrite` is False.
        """
        if self.error is not None or (provenance := self.provenance) is None:
            raise self.error or FailedPrecondition("the answer has no provenance")
        drawings = [
            each
            for i, prediction in enumerate(self.predictions)
            if prediction is not None
            for each in self._dicom_drawings(i)
        ]
        return dicom.write(drawings, Path(folder), provenance=provenance, overwrite=overwrite)

    def to_dict(self) -> dict[str, object]:
        """Return everything except the maps as values for JSON. `save` writes it into `answer.json`."""
        return storage.to_dict(self)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return predictions, targets, convergence and failures as a pandas DataFrame with one row per example.

        With a top-k target, the cells of the target columns are tuples of k. `ImportError` if pandas is missing.
        """
        return to_dataframe(self)

    def _dicom_drawings(self, i: int) -> Iterator[dicom.Drawing]:
        picture, geometry = self._original(i), self.geometry[i]
        batch = self._kept_batch
        file = None if batch is None else batch.dicom_file(i)
        if file is None or geometry is None:
            raise InvalidArgument(f"images: example {i} is not a DICOM file, which save_dicom needs as the source")
        box = crop_box(picture.size, geometry)
        for k, target in enumerate(self[i].targets):
            name = f"{i:03}-{k}" if self.is_top_k else f"{i:03}"
            placed = placed_map(self.heatmap(i, k=k), box, picture.size).astype(np.float32)
            yield dicom.Drawing(name, file, placed, self.overlay(i, k=k, original=True), target)

    @property
    def _kept_batch(self) -> EncodedBatch | None:
        return self._batch.batch if isinstance(self._batch, WeakBatch) else self._batch

    def _original(self, i: int) -> Image.Image:
        batch = self._kept_batch
        if batch is None or self.error is not None:
            raise self.error or FailedPrecondition(
                "the answer no longer has its images: on a stream they are kept until the next answer is read; draw "
                "before that, or pass keep_images=True to stream()"
            )
        if error := next((each for each in self.failures if each.example == range(len(self))[i]), None):
            raise from_code(error.code, error.message)
        geometry = self.geometry[i]
        return batch.picture(i, window=geometry.window if geometry else None)

    def _overlays(self, i: int, *, original: bool) -> dict[str, Image.Image]:
        if not self.is_top_k:
            return {f"{i:03}.png": self.overlay(i, original=original)}
        return {f"{i:03}-{k}.png": self.overlay(i, k=k, original=original) for k in range(self.maps.shape[1])}


def with_weak_batch(answer: Attribution, batch: EncodedBatch) -> Attribution:
    """Return the answer with only a weak reference to its batch of arrays. Files are small, and kept."""
    if answer._batch is None or batch.array is None:
        return answer
    return dataclasses.replace(answer, _batch=WeakBatch(batch))


def failed(error: SidelightError, *, index: int, id_: str = "") -> Attribution:
    """Return the answer for a batch that failed as a whole."""
    return Attribution(maps=np.empty((0, 0, 0), np.float32), index=index, id=id_, error=error)
