"""A method: how points are chosen and gradients folded.

A method is a generator. It yields the sweep that it needs, is resumed when every row of it was folded, may look at what
came of it, and yields again; what it returns is the example's attribution. So one form says one-shot, adaptive and
composed methods, and a paused generator is an example in progress.
"""

import abc
import enum
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidArgument
from .channels import Channels, Magnitude, may_be_negative, reduce

Shape = tuple[int, int, int]  # C, H, W of the model's input


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer by its name; empty is the model's default."""

    name: str


class Rectifiers(enum.Enum):
    """The input, through rectifiers whose backward rule is another."""

    GUIDED = "guided"


Probe = Layer | Rectifiers | None  # where the gradient is taken; None is the input


@dataclass(frozen=True, slots=True)
class RowOutput:
    """What one row gave. Tensors are on the device, and views on their chunk's."""

    input: Tensor  # [C, H, W], the point where it was taken
    predicted: int
    probability: float  # of the predicted class
    explained: int
    score: float
    probabilities: Tensor  # [K]
    gradient: Tensor | None = None  # [C, H, W], or [c, h, w] of a layer; None where it was not wanted
    activation: Tensor | None = None  # [c, h, w] of a layer
    is_dead: bool = False  # whether the gradient of the score is numerically nothing
    map: Tensor | None = None  # float32 [H, W] on the host, where the largest absolute gradient is all that is wanted

    def kept(self) -> "RowOutput":
        """Return a copy that does not keep the whole chunk's memory."""
        return replace(
            self,
            input=self.input.clone(),
            probabilities=self.probabilities.clone(),
            gradient=None if self.gradient is None else self.gradient.clone(),
            activation=None if self.activation is None else self.activation.clone(),
        )


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points that a method asks for in one go. Each is built on the device, when a chunk takes it.

    `fold` is called for each row, in the points' order. A point may be built again, after a chunk that failed.
    """

    count: int
    point: Callable[[int], Tensor] | None  # [C, H, W]; None: the example itself, as it was staged
    fold: Callable[[int, RowOutput], None]
    gradient: bool = True  # False: a forward pass is enough


@dataclass(frozen=True, slots=True)
class Outcome:
    """An attribution, and how good it is."""

    attribution: Tensor  # [C, H, W], or [H, W] where there is one number for each pixel
    error: float | None = None  # what a tolerance is compared with
    completeness_error: float | None = None  # |sum of the attribution − difference of the scores|
    relative_completeness_error: float | None = None
    is_met: bool | None = None  # whether a tolerance was met; None where there is none
    is_negligible: bool | None = None  # whether it is rounding alone; None: where the map is zero everywhere


@dataclass(frozen=True, slots=True)
class Improved:
    """What a method has so far, where that is of use to a caller who watches."""

    outcome: Outcome


Steps = Generator[Sweep | Improved, None, Outcome]


@dataclass(frozen=True, slots=True)
class Example:
    """One example as its method sees it."""

    x: Tensor  # [C, H, W], the model's input
    place: int  # in its batch
    black: Tensor | None  # [C, 1, 1], pixel 0 after preprocessing; None where there is no preprocessing
    first: RowOutput | None  # what was read at x before the method began
    is_watched: bool = False  # whether anybody takes an `Improved`
    step: float = 0.0  # the relative step of the type that the model computes in

    def moved(self, x: Tensor) -> "Example":
        """Return this example at another place of the input space."""
        return replace(self, x=x, first=None, is_watched=False)

    def read(self, *, gradient: bool) -> Generator[Sweep, None, RowOutput]:
        """Return what there is to read at x, from before where that is enough."""
        if self.first is not None and (self.first.gradient is not None or not gradient):
            return self.first
        return (yield from read(self.x, gradient=gradient))


def read(point: Tensor | None, *, gradient: bool) -> Generator[Sweep, None, RowOutput]:
    """Return what there is to read at one point, [C, H, W], or at the example as it was staged: a single row."""
    outputs: list[RowOutput] = []
    yield Sweep(1, None if point is None else lambda _: point, lambda _, output: outputs.append(output), gradient)
    return outputs[0]


# What is no more than so many relative steps of the terms that it is the sum of is their rounding. Where a layer's mean
# gradient is 0 by symmetry, Grad-CAM's maps were seen at 0.02 to 0.15 steps, and those of other layers at 2 million.
ROUNDING_STEPS = 8


class Method(abc.ABC):
    """What all methods have. Their parameters are fields; wrong ones raise `InvalidArgument` when they are set."""

    __slots__ = ()

    name: ClassVar[str]
    needs_gradient: ClassVar[bool] = True  # False: outputs are all that it looks at

    @property
    def begins_with_gradient(self) -> bool:
        """Whether a method's first row, the example itself, wants a gradient; the others just look at the class."""
        return False

    @property
    def is_one_row(self) -> bool:
        """Whether the example itself is all that is run."""
        return False

    @property
    def probe(self) -> Probe:
        """Where the gradient is taken."""
        return None

    @property
    def magnitude(self) -> Magnitude | None:
        """What becomes of a gradient's sign; None where the attribution is not a bare gradient."""
        return None

    @property
    def tolerance(self) -> float | None:
        """At which error an example ends; None where a method takes a fixed number of rows."""
        return None

    @property
    def given(self) -> NDArray[np.generic] | None:
        """The baselines that came with the request, as an array."""
        return None

    @property
    def largest(self) -> float:
        """The largest absolute value that a baseline brings into the model's input space."""
        return 0.0

    @abc.abstractmethod
    def rows(self, shape: Shape) -> int:
        """Return how many rows one example takes, at most."""

    @abc.abstractmethod
    def run(self, example: Example) -> Steps:
        """Explain an example: yield sweeps, return the attribution."""

    def check(self, shape: Shape, n_examples: int) -> None:
        """Refuse with `InvalidArgument` what does not fit inputs of a shape. Most fit any."""
        return

    def finish(self, attribution: Tensor, channels: Channels, shape: Shape) -> Tensor:
        """Return the map, [H, W] or [C, H, W], of an attribution."""
        if attribution.ndim == 2:
            return attribution.expand(shape) if channels is Channels.NONE else attribution
        return reduce(attribution, channels, self.magnitude)

    def is_largest_absolute(self, channels: Channels) -> bool:
        """Whether the map is the largest absolute gradient over the channels, at the example itself."""
        return False

    def may_be_negative(self, channels: Channels) -> bool:
        """Say whether a map may have negative elements."""
        return may_be_negative(channels, self.magnitude)


def at_least(name: str, value: float, least: float) -> None:
    """Refuse a parameter that is smaller, or no number."""
    if not value >= least or value == float("inf"):
        raise InvalidArgument(f"method.{name}: got {value:g}, expected at least {least:g}")


def in_open_unit(name: str, value: float) -> None:
    """Refuse a parameter that is not in (0, 1)."""
    if not 0 < value < 1:
        raise InvalidArgument(f"method.{name}: got {value:g}, expected a number in (0, 1)")


def steps_or_tolerance(
    name: str, steps: int, tolerance: float | None, *, least: int, counted: Literal["steps", "samples"]
) -> None:
    """Refuse neither and both of a number of steps and a tolerance."""
    if tolerance is None:
        at_least(f"{name}.{counted}", steps, least)
        return
    in_open_unit(f"{name}.tolerance", tolerance)
    if steps:
        raise InvalidArgument(f"method.{name}: got {counted} {steps} and tolerance {tolerance:g}, expected one of them")
