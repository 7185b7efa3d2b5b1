"""Baselines: the reference input of a path, or the fill of an occluded window, in the model's input space."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import FailedPrecondition, InvalidArgument
from .method import Example, Shape

TRUNCATE = 4.0  # standard deviations at which the blur's kernel ends
MAX_SIGMAS = 4.0  # limit of a blur's sigma, relative to the longer side: larger ones change little and cost time


@dataclass(frozen=True, slots=True)
class Constant:
    """A baseline of one value for every element."""

    value: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise InvalidArgument(f"method.baseline.constant: got {self.value}, expected a finite number")

    @property
    def largest(self) -> float:
        return abs(self.value)

    def check(self, shape: Shape, n_examples: int) -> None:
        """Accept any shape."""

    def of(self, example: Example) -> Tensor:
        """Return the baseline, [C, H, W]."""
        return torch.full_like(example.x, self.value)


ZERO = Constant()


@dataclass(frozen=True, slots=True)
class _OfExample:
    """A baseline whose values do not exceed those of the example or of the preprocessing."""

    @property
    def largest(self) -> float:
        """0: it adds no larger values."""
        return 0.0

    def check(self, shape: Shape, n_examples: int) -> None:
        """Accept any shape; subclasses may raise `InvalidArgument`."""


@dataclass(frozen=True, slots=True)
class Black(_OfExample):
    """An image of pixel value 0, after preprocessing."""

    def of(self, example: Example) -> Tensor:
        if example.black is None:
            raise FailedPrecondition("method.baseline.black: the model has no preprocessing, so no pixel is black")
        return example.black.expand_as(example.x)


@dataclass(frozen=True, slots=True)
class MeanColor(_OfExample):
    """The example's mean of each channel."""

    def of(self, example: Example) -> Tensor:
        return example.x.mean(dim=(1, 2), keepdim=True).expand_as(example.x)


@dataclass(frozen=True, slots=True)
class Blurred(_OfExample):
    """The example under a Gaussian blur with replicated edges."""

    sigma: float  # the standard deviation in pixels

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise InvalidArgument(f"method.baseline.blurred.sigma: got {self.sigma:g}, expected a positive number")

    def check(self, shape: Shape, n_examples: int) -> None:
        """Raise `InvalidArgument` for a sigma that is too large for the image."""
        if self.sigma > (most := MAX_SIGMAS * max(shape[1:])):
            raise InvalidArgument(
                f"method.baseline.blurred.sigma: got {self.sigma:g}, expected at most {most:g}, "
                f"{MAX_SIGMAS:g} times the longer side of the model's input"
            )

    def of(self, example: Example) -> Tensor:
        blurred = example.x[:, None]  # [C, 1, H, W]
        for axis in (2, 3):
            blurred = self._along(blurred, axis)
        return blurred[:, 0]

    def _along(self, x: Tensor, axis: int) -> Tensor:
        radius = int(TRUNCATE * self.sigma + 0.5)
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
        weights = torch.exp(-0.5 * (offsets / self.sigma) ** 2)
        if (beyond := radius - x.shape[axis]) > 0:  # beyond this the kernel only covers the replicated edge
            edge = weights[:beyond].sum()
            weights, radius = weights[beyond:-beyond], radius - beyond
            weights[[0, -1]] += edge
        kernel = (weights / weights.sum()).to(x.device, x.dtype)
        padding = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        padded = nn.functional.pad(x, padding, mode="replicate")
        return nn.functional.conv2d(padded, kernel.view(1, 1, -1, 1) if axis == 2 else kernel.view(1, 1, 1, -1))


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """An array given in the request: [C, H, W], or [N, C, H, W] with one per example."""

    array: NDArray[np.floating]

    def __post_init__(self) -> None:
        check_finite("baseline.tensor", self.array)

    def of(self, example: Example) -> Tensor:
        return tensor_like(self.array if self.array.ndim == 3 else self.array[example.index], example.x)

    @property
    def largest(self) -> float:
        return largest(self.array)

    def check(self, shape: Shape, n_examples: int) -> None:
        """Raise `InvalidArgument` unless the shape is that of the examples."""
        got = self.array.shape
        if got not in (shape, (n_examples, *shape)):
            raise InvalidArgument(
                f"method.baseline.tensor: shape {list(got)}, expected {list(shape)} or {[n_examples, *shape]}"
            )


Baseline = Constant | Black | MeanColor | Blurred | Given


def check_finite(name: str, array: NDArray[np.floating]) -> None:
    """Raise `InvalidArgument` if an array has elements that are not finite."""
    if not np.isfinite(array).all():
        raise InvalidArgument(f"method.{name}: it has NaN or infinite elements, expected finite ones")


def largest(array: NDArray[np.floating]) -> float:
    """Return the largest absolute element."""
    return float(np.abs(array).max(initial=0))


def tensor_like(array: NDArray[np.floating], like: Tensor) -> Tensor:
    """Return an array as a tensor of the type and on the device of `like`."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(like.device, like.dtype)
