"""Perturbation methods: they occlude parts of the example and measure the score, without gradients."""

from collections.abc import Callable
from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.validation import counted, real, whole
from ..exceptions import InvalidArgument
from .baselines import Baseline, baseline_message
from .method import Method


@dataclass(frozen=True, slots=True, eq=False)
class Occlusion(Method):
    """The drop of the score when a sliding window is occluded; one signed value per pixel.

    Zeiler and Fergus, 2014, "Visualizing and Understanding Convolutional Networks". `window` and `stride` are in
    pixels, one number or (height, width); `stride=None` is the window size. `baseline`, as for `IntegratedGradients`,
    fills the window.
    """

    window: int | tuple[int, int] = 16
    stride: int | tuple[int, int] | None = None
    baseline: Baseline = "zero"

    def message(self) -> pb.Method:
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
class RISE(Method):
    """For each pixel, the mean score over random masks that keep it; one signed value per pixel.

    Petsiuk, Das and Saenko, 2018, "RISE: Randomized Input Sampling for Explanation of Black-box Models". A mask is
    an upsampled grid of `cells` × `cells`, each kept with `keep_probability`, in (0, 1).
    """

    masks: int = 1000
    cells: int = 7
    keep_probability: float = 0.5
    seed: int = 0

    def message(self) -> pb.Method:
        return pb.Method(
            rise=pb.RiseMethod(
                masks=whole(self.masks, "method.masks"),
                cells=whole(self.cells, "method.cells"),
                keep_probability=real(self.keep_probability, "method.keep_probability"),
                seed=whole(self.seed, "method.seed", bits=64),
            )
        )


def _pair(value: object, field: str, check: Callable[[object, str], int]) -> tuple[int, int]:
    """Return (height, width) after checking each."""
    if not isinstance(value, tuple | list):
        return check(value, field), check(value, field)
    if len(value) != 2:
        raise InvalidArgument(f"{field}: got {value!r}, expected a number or (height, width)")
    return check(value[0], field), check(value[1], field)
