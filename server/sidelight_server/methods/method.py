"""The interface of attribution methods.

A method is a generator. It yields a sweep (the points that it needs), is resumed once every row of it was folded, and
may then yield another one; its return value is the example's attribution. One-shot, adaptive and composed methods all
have this form, and a suspended generator is an example in progress.
"""

import abc
import enum
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidArgument
from .channels import Channels, Magnitude, may_be_negative, reduce

Shape = tuple[int, int, int]  # C, H, W of the model's input


@dataclass(frozen=True, slots=True)
class Layer:
    """A probe at a layer, by its name; empty is the model's default layer."""

    name: str


class Rectifiers(enum.Enum):
    """A probe at the input, with a modified backward rule of ReLUs."""

    GUIDED = "guided"


Probe = Layer | Rectifiers | None  # where the gradient is taken; None is the input


class HostMaps(NamedTuple):
    """Finished maps of one example on the host: those from `start` to `end` of the n that arrived together."""

    together: NDArray[np.float32 | np.float64]  # [n, H, W], or [n, C, H, W] without channel reduction
    all_largest: NDArray[np.floating]  # [n], the largest absolute values; not finite where an element is not
    start: int
    end: int

    @property
    def elements(self) -> NDArray[np.float32 | np.float64]:
        """The example's maps, [k, …], as a view."""
        return self.together[self.start : self.end]

    @property
    def largest(self) -> NDArray[np.floating]:
        """The largest absolute value of each of them, [k]."""
        return self.all_largest[self.start : self.end]

    def precedes(self, other: "HostMaps") -> bool:
        """Whether the other example's maps lie directly behind these."""
        return self.together is other.together and self.end == other.start


@dataclass(slots=True)  # not frozen: there is one for each row, and it would take three times as long to construct
class RowOutput:
    """The output of one row. Tensors are on the device, and views on those of the chunk."""

    input: Tensor  # [C, H, W], the point of the row
    predicted: int
    probability: float  # of the predicted class
    explained: int
    score: float
    probabilities: Tensor  # [K]
    gradient: Tensor | None = None  # [C, H, W], or [c, h, w] of a layer; None if not requested
    activation: Tensor | None = None  # [c, h, w] of a layer
    is_dead: bool = False  # whether the gradient of the score is numerically zero
    maps: HostMaps | None = None  # k = 1, float32, if the chunk has reduced all gradients at once

    def copy(self) -> "RowOutput":
        """Return a copy that does not keep the whole chunk alive."""
        return replace(
            self,
            input=self.input.clone(),
            probabilities=self.probabilities.clone(),
            gradient=None if self.gradient is None else self.gradient.clone(),
            activation=None if self.activation is None else self.activation.clone(),
        )


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points that a method requests at once. Each point is built on the device when a chunk takes its row.

    `fold` is called for each row, in the order of the points. A point may be built again after a failed chunk.
    """

    count: int
    point: Callable[[int], Tensor] | None  # returns [C, H, W]; None: the staged example itself
    fold: Callable[[int, RowOutput], None]
    gradient: bool = True  # False: forward pass only


@dataclass(frozen=True, slots=True)
class Outcome:
    """An attribution and its error measures."""

    attribution: Tensor  # [C, H, W], or [H, W] for one value per pixel
    error: float | None = None  # the error that is compared with the tolerance
    completeness_error: float | None = None  # |sum of the attribution − difference of the scores|
    relative_completeness_error: float | None = None
    is_met: bool | None = None  # whether the tolerance was met; None without one
    is_negligible: bool | None = None  # whether it is rounding error only; None: not determined


@dataclass(frozen=True, slots=True)
class Improved:
    """A partial outcome, for clients that requested partial maps."""

    outcome: Outcome


Steps = Generator[Sweep | Improved, None, Outcome]


@dataclass(frozen=True, slots=True)
class Example:
    """One example, as a method gets it."""

    x: Tensor  # [C, H, W], the model's input
    index: int  # in its batch
    black: Tensor | None  # [C, 1, 1], pixel 0 after preprocessing; None without preprocessing
    first: RowOutput | None  # the row output at x, if it was computed before
    is_watched: bool = False  # whether partial outcomes (`Improved`) are wanted
    step: float = 0.0  # machine epsilon of the type that the model computes in

    def moved(self, x: Tensor) -> "Example":
        """Return this example at another point of the input space."""
        return replace(self, x=x, first=None, is_watched=False)

    def evaluate(self, *, gradient: bool) -> Generator[Sweep, None, RowOutput]:
        """Return the row output at x; reuses `first` if that is sufficient."""
        if self.first is not None and (self.first.gradient is not None or not gradient):
            return self.first
        return (yield from evaluate(self.x, gradient=gradient))


def evaluate(point: Tensor | None, *, gradient: bool) -> Generator[Sweep, None, RowOutput]:
    """Run a single row at a point, [C, H, W], or at the staged example itself; return its output."""
    outputs: list[RowOutput] = []
    yield Sweep(1, None if point is None else lambda _: point, lambda _, output: outputs.append(output), gradient)
    return outputs[0]


# A sum of at most this many relative steps of its terms is considered rounding error. For layers whose mean gradient is
# 0 by symmetry, maps of Grad-CAM had 0.02 to 0.15 steps; for other layers 2 million.
ROUNDING_STEPS = 8


class Method(abc.ABC):
    """Base class of methods. Parameters are dataclass fields; invalid ones raise `InvalidArgument` at construction."""

    __slots__ = ()

    name: ClassVar[str]
    needs_gradient: ClassVar[bool] = True  # False: it only uses outputs

    @property
    def begins_with_gradient(self) -> bool:
        """Whether the first row, the example itself, needs a gradient; otherwise it only finds the class."""
        return False

    @property
    def is_one_row(self) -> bool:
        """Whether the example itself is the only row."""
        return False

    @property
    def probe(self) -> Probe:
        """Where the gradient is taken."""
        return None

    @property
    def magnitude(self) -> Magnitude | None:
        """How the gradient's sign is treated; None if the attribution is not a plain gradient."""
        return None

    @property
    def tolerance(self) -> float | None:
        """The error at which an example ends; None for a fixed number of rows."""
        return None

    @property
    def given_baselines(self) -> NDArray[np.generic] | None:
        """The baselines that the request gave as an array, if any."""
        return None

    @property
    def largest_baseline(self) -> float:
        """The largest absolute value of the baselines, in the model's input space."""
        return 0.0

    @abc.abstractmethod
    def rows(self, shape: Shape) -> int:
        """Return an upper bound of the rows that one example takes."""

    @abc.abstractmethod
    def run(self, example: Example) -> Steps:
        """Explain an example: yield sweeps, return the attribution."""

    def check(self, shape: Shape, n_examples: int) -> None:
        """Raise `InvalidArgument` if the parameters do not fit inputs of this shape. By default they do."""
        return

    def finish(self, attribution: Tensor, channels: Channels, shape: Shape) -> Tensor:
        """Return the map, [H, W] or [C, H, W], of an attribution."""
        if attribution.ndim == 2:
            return attribution.expand(shape) if channels is Channels.NONE else attribution
        return reduce(attribution, channels, self.magnitude)

    def reduction(self, channels: Channels) -> Channels | None:
        """How the gradient at the example itself becomes the map, if the method does nothing else; None: it does."""
        return None

    def may_be_negative(self, channels: Channels) -> bool:
        """Return whether a map may have negative elements."""
        return may_be_negative(channels, self.magnitude)


class OneRowMethod(Method):
    """Base class of methods that need only the gradient at the example itself."""

    __slots__ = ()

    @property
    def begins_with_gradient(self) -> bool:
        return True

    @property
    def is_one_row(self) -> bool:
        return True

    def rows(self, shape: Shape) -> int:
        return 1


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise `InvalidArgument` if a parameter is smaller, infinite or NaN."""
    if not value >= least or value == float("inf"):
        raise InvalidArgument(f"method.{name}: got {value:g}, expected at least {least:g}")


def check_in_open_unit(name: str, value: float) -> None:
    """Raise `InvalidArgument` if a parameter is not in (0, 1)."""
    if not 0 < value < 1:
        raise InvalidArgument(f"method.{name}: got {value:g}, expected a number in (0, 1)")


def check_steps_or_tolerance(
    name: str, steps: int, tolerance: float | None, *, least: int, counted: Literal["steps", "samples"]
) -> None:
    """Raise `InvalidArgument` unless exactly one of a number of steps and a tolerance is given."""
    if tolerance is None:
        check_at_least(f"{name}.{counted}", steps, least)
        return
    check_in_open_unit(f"{name}.tolerance", tolerance)
    if steps:
        raise InvalidArgument(f"method.{name}: got {counted} {steps} and tolerance {tolerance:g}, expected one of them")
