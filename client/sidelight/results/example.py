"""`ExampleAttribution`: one example of an answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..visualization.colormaps import HIGH_PERCENTILE, colorize
from ..visualization.overlay import encoded
from ..visualization.styles import TOP_PERCENT, StyleName
from .display import example_text
from .types import Convergence, ExplainedTarget, Failure, Geometry, Prediction

if TYPE_CHECKING:
    from .attribution import Attribution


@dataclass(frozen=True, slots=True, eq=False)
class ExampleAttribution:
    """One example of an answer, as `answer[i]` and iteration return it. A view: nothing is copied.

    Values that the answer does not have are None. For a failed example, all except `failure` are None.
    """

    answer: "Attribution"
    index: int  # in the batch

    @property
    def name(self) -> str | None:
        """The path that the example was read from."""
        return self.answer.names[self.index] if self.answer.names else None

    @property
    def map(self) -> NDArray[np.float32]:
        """The example's part of `answer.maps`; NaN if the example failed."""
        map_: NDArray[np.float32] = self.answer.maps[self.index]
        return map_

    @property
    def prediction(self) -> Prediction | None:
        """The class with the largest output."""
        return self.answer.predictions[self.index]

    @property
    def target(self) -> ExplainedTarget | tuple[ExplainedTarget, ...] | None:
        """The class that the map explains; k of them with a top-k target."""
        return self.answer.targets[self.index]

    @property
    def targets(self) -> tuple[ExplainedTarget, ...]:
        """The classes that the example's maps explain, always as a tuple."""
        target = self.target
        return target if isinstance(target, tuple) else (target,) if target else ()

    @property
    def geometry(self) -> Geometry | None:
        """How the picture was resized and cropped; None for floating arrays."""
        return self.answer.geometry[self.index]

    @property
    def convergence(self) -> Convergence | None:
        """The map's error estimates; None for methods of one row."""
        return self.answer.convergence[self.index] if self.answer.convergence else None

    @property
    def probabilities(self) -> NDArray[np.float32] | None:
        """The probability of every class [K], if requested."""
        return None if self.answer.probabilities is None else self.answer.probabilities[self.index]

    @property
    def failure(self) -> Failure | None:
        """Why the example has no map; None if it did not fail."""
        return next((each for each in self.answer.failures if each.example == self.index), None)

    def heatmap(self, *, k: int = 0) -> NDArray[np.float32]:
        """Return the map as [H, W]: `Attribution.heatmap` of this example."""
        return self.answer.heatmap(self.index, k=k)

    def picture(self) -> Image.Image:
        """Return the input picture: `Attribution.picture` of this example."""
        return self.answer.picture(self.index)

    def overlay(
        self,
        *,
        k: int = 0,
        colormap: str | None = None,
        alpha: float | None = None,
        percentile: float = HIGH_PERCENTILE,
        original: bool = False,
        style: StyleName = "color",
        top_percent: float = TOP_PERCENT,
    ) -> Image.Image:
        """Draw the map over the picture: `Attribution.overlay` of this example."""
        return self.answer.overlay(
            self.index,
            k=k,
            colormap=colormap,
            alpha=alpha,
            percentile=percentile,
            original=original,
            style=style,
            top_percent=top_percent,
        )

    def __repr__(self) -> str:
        return f"ExampleAttribution({self.index}: {example_text(self)})"

    def _repr_png_(self) -> bytes | None:
        """Return the overlay for a notebook, or only the map if the answer no longer has its images."""
        if self.prediction is None:
            return None
        try:
            drawn = self.overlay()
        except Exception:  # Pillow and pydicom document no set of exceptions; a notebook cell must still show the map
            drawn = colorize(self.heatmap())
        return encoded(drawn, "PNG")
