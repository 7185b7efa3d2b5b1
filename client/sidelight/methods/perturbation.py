"""Perturbation methods: they hide parts of the example and watch the score. No gradient is taken."""

from collections.abc import Callable
from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.validation import counted, real, whole
from ..exceptions import InvalidArgument
from .baselines import Baseline, baseline_message


@dataclass(frozen=True, slots=True, eq=False)
class Occlusion:
    """How much the score falls when one window after another is hidden; one number with its sign for each pixel.

    Zeiler and Fergus, 2014, "Visualizing and Understanding Convolutional Networks". `window` and `stride` are pixels,
    one number or (height, width); `stride=None` is the window. `baseline`, as of `IntegratedGradients`, fills it.
    """

    window: int | tuple[int, int] = 16
    stride: int | tuple[int, int] | None = None
    baseline: Baseline = "zero"

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        height, width = _pair(self.window, "method.window", whole)
        strides = (height, width) if self.stride is None else _pair(self.stride, "method.stride", counted)
        return pb.Method(
            occlusion=pb.OcclusionMethod(
                window_height=height,
                window_width=width,
                stride_height=strides[0],
                stride_width=strides[1],
                baseline=baseline_message(self.baseline),
            )
        )


@dataclass(frozen=True, slots=True)
class RISE:
    """The score with random grids hidden, averaged where they show; one number with its sign for each pixel.

    Petsiuk, Das and Saenko, 2018, "RISE: Randomized Input Sampling for Explanation of Black-box Models". A grid has
    `cells` × `cells`, each of which is shown with `keep_probability`, in (0, 1).
    """

    masks: int = 1000
    cells: int = 7
    keep_probability: float = 0.5
    seed: int = 0

    def message(self) -> pb.Method:
        """Return what goes over the wire."""
        return pb.Method(
            rise=pb.RiseMethod(
                masks=whole(self.masks, "method.masks"),
                cells=whole(self.cells, "method.cells"),
                keep_probability=real(self.keep_probability, "method.keep_probability"),
                seed=whole(self.seed, "method.seed", bits=64),
            )
        )


def _pair(value: object, field: str, check: Callable[[object, str], int]) -> tuple[int, int]:
    """Return height and width, each checked."""
    if not isinstance(value, tuple | list):
        return check(value, field), check(value, field)
    if len(value) != 2:
        raise InvalidArgument(f"{field}: got {value!r}, expected a number or (height, width)")
    return check(value[0], field), check(value[1], field)
