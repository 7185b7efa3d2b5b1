"""Integrated gradients: gradients along the path from a baseline to the example, times their difference."""

import enum
import functools
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidArgument
from .baseline import ZERO, Baseline, Given
from .method import (
    Example,
    Improved,
    Method,
    Outcome,
    RowOutput,
    Shape,
    Steps,
    Sweep,
    check_at_least,
    check_steps_or_tolerance,
    evaluate,
)
from .welford import accumulator

SINGLE = float(np.finfo(np.float32).eps)
ROUNDING = 16 * SINGLE  # rounding error of the difference of two scores, relative to both
MIN_INTERVALS = 8  # with fewer, a refinement may change little by chance: paths are often flat at both ends
MAX_GAUSS_NODES = 2000  # computing this many nodes takes less time than running one of them
NEWTON_STEPS = 6  # each step doubles the digits; the first guess has about four


class Rule(enum.Enum):
    """The quadrature along a path."""

    GAUSS_LEGENDRE = "gauss_legendre"
    MIDPOINT = "midpoint"
    TRAPEZOID = "trapezoid"

    def nodes(self, n: int) -> tuple[list[float], list[float]]:
        """Return n nodes in [0, 1] and their weights, which sum to 1, in double precision."""
        match self:
            case Rule.GAUSS_LEGENDRE:
                nodes, weights = _gauss_legendre(n)
            case Rule.MIDPOINT:
                nodes, weights = (np.arange(n) + 0.5) / n, np.full(n, 1 / n)
            case Rule.TRAPEZOID:
                nodes, weights = np.linspace(0, 1, n), np.full(n, 1 / (n - 1))
                weights[[0, -1]] /= 2
        return nodes.tolist(), weights.tolist()


@dataclass(frozen=True, slots=True)
class IntegratedGradients(Method):
    """The integral of the gradient along the straight path from a baseline, times their difference.

    Sundararajan, Taly and Yan, 2017, "Axiomatic Attribution for Deep Networks". With a tolerance, a trapezoidal rule is
    refined by halving its step until both criteria hold: the last halving changed the attribution by at most this share
    of its L2 norm, and the completeness error is at most this share of its L1 norm. Both are needed: nodes that all
    miss a narrow kink agree with each other, and the sum can be right by chance.
    """

    name: ClassVar[str] = "integrated_gradients"
    steps: int = 50
    rule: Rule = Rule.GAUSS_LEGENDRE
    baseline: Baseline = ZERO
    tolerance: float | None = None
    max_rows: int = 300  # rows of one example, with a tolerance

    def __post_init__(self) -> None:
        least = 2 if self.rule is Rule.TRAPEZOID else 1
        check_steps_or_tolerance(self.name, self.steps, self.tolerance, least=least, counted="steps")
        if self.rule is Rule.GAUSS_LEGENDRE and self.steps > MAX_GAUSS_NODES:
            raise InvalidArgument(
                f"method.{self.name}.steps: got {self.steps}, expected at most {MAX_GAUSS_NODES} by gauss_legendre; "
                "midpoint and trapezoid take more"
            )
        if self.tolerance is not None:
            check_at_least(f"{self.name}.max_rows", self.max_rows, 3)
            if self.rule is not Rule.TRAPEZOID:
                raise InvalidArgument(
                    f"method.{self.name}.rule: got {self.rule.value} with a tolerance, expected trapezoid, which alone "
                    "can be refined"
                )

    @property
    def begins_with_gradient(self) -> bool:
        """Whether the rule has a node at the example itself: the trapezoid has."""
        return self.rule is Rule.TRAPEZOID

    @property
    def given_baselines(self) -> NDArray[np.generic] | None:
        return self.baseline.array if isinstance(self.baseline, Given) else None

    @property
    def largest_baseline(self) -> float:
        return self.baseline.largest

    def check(self, shape: Shape, n_examples: int) -> None:
        self.baseline.check(shape, n_examples)

    def rows(self, shape: Shape) -> int:
        """Return the number of nodes, plus the two ends if they are not nodes."""
        if self.tolerance is not None:
            return self.max_rows
        return self.steps if self.rule is Rule.TRAPEZOID else self.steps + 2

    def run(self, example: Example) -> Steps:
        path = _Path(self.baseline.of(example), example.x)
        if self.tolerance is not None:
            return (yield from self._refine(example, path, self.tolerance))
        if self.rule is Rule.TRAPEZOID:
            return (yield from self._trapezoid(example, path))
        end = yield from example.evaluate(gradient=False)
        start = yield from evaluate(path.start, gradient=False)
        nodes, weights = self.rule.nodes(self.steps)
        mean = yield from path.sum(nodes, weights)
        return path.outcome(mean, rise=_Rise.of(start, end))

    def _trapezoid(self, example: Example, path: "_Path") -> Steps:
        nodes, weights = self.rule.nodes(self.steps)
        mean, rise = yield from path.ends(example)
        mean.mul_(2 * weights[0]).add_((yield from path.sum(nodes[1:-1], weights[1:-1])))
        return path.outcome(mean, rise=rise)

    def _refine(self, example: Example, path: "_Path", tolerance: float) -> Steps:
        mean, rise = yield from path.ends(example)
        n, error = 1, float("inf")
        is_met = False
        while 2 * n + 1 <= self.max_rows and not is_met:
            # The new nodes are half-way between the old ones, whose gradients are already in the mean.
            nodes = [(k + 0.5) / n for k in range(n)]
            refined = (yield from path.sum(nodes, [0.5 / n] * n)).add_(mean, alpha=0.5)
            error = path.distance(refined, mean)
            mean, n = refined, 2 * n
            is_met = n >= MIN_INTERVALS and error <= tolerance and path.missing_share(mean, rise) <= tolerance
            if example.is_watched:
                yield Improved(path.outcome(mean, rise=rise, error=error, is_met=is_met))
        return path.outcome(mean, rise=rise, error=error, is_met=is_met)


@dataclass(frozen=True, slots=True)
class _Path:
    """The straight path from a baseline to an example, both [C, H, W]."""

    start: Tensor
    end: Tensor

    @property
    def difference(self) -> Tensor:
        return self.end - self.start

    def at(self, t: float) -> Tensor:
        """Return the point at t: the start for 0, the end for 1."""
        return self.start + t * (self.end - self.start)

    def sum(self, nodes: list[float], weights: list[float]) -> Generator[Sweep, None, Tensor]:
        """Return the weighted sum of the gradients at nodes of the path."""
        total = accumulator(self.end)
        if nodes:
            yield Sweep(
                len(nodes), lambda k: self.at(nodes[k]), lambda k, output: _add(total, output.gradient, weights[k])
            )
        return total

    def ends(self, example: Example) -> Generator[Sweep, None, "tuple[Tensor, _Rise]"]:
        """Return the mean gradient of both ends, and the rise of the score between them."""
        end = yield from example.evaluate(gradient=True)
        start = yield from evaluate(self.start, gradient=True)
        mean = accumulator(self.end)
        for output in (start, end):
            _add(mean, output.gradient, 0.5)
        return mean, _Rise.of(start, end)

    def distance(self, refined: Tensor, mean: Tensor) -> float:
        """Return the change of the attribution, relative to its L2 norm."""
        difference = self.difference
        change = float(torch.linalg.vector_norm((refined - mean) * difference, dtype=torch.float64))
        size = float(torch.linalg.vector_norm(refined * difference, dtype=torch.float64))
        return change / size if size else (0.0 if not change else float("inf"))

    def missing_share(self, mean: Tensor, rise: "_Rise") -> float:
        """Return the completeness error beyond rounding, relative to the attribution's L1 norm."""
        attribution = mean * self.difference
        missing = rise.missing(attribution) - rise.rounding
        size = float(torch.linalg.vector_norm(attribution, ord=1, dtype=torch.float64))
        return missing / size if size and missing > 0 else (0.0 if missing <= 0 else float("inf"))

    def outcome(
        self, mean: Tensor, *, rise: "_Rise", error: float | None = None, is_met: bool | None = None
    ) -> Outcome:
        """Return the attribution from the path's mean gradient, with its completeness error."""
        attribution = mean * self.difference
        missing = rise.missing(attribution)
        return Outcome(attribution, error, missing, missing / abs(rise.of_score) if rise.of_score else None, is_met)


@dataclass(frozen=True, slots=True)
class _Rise:
    """The rise of the score along a path, and the rounding error of that difference."""

    of_score: float
    rounding: float

    @classmethod
    def of(cls, start: RowOutput, end: RowOutput) -> "_Rise":
        return cls(end.score - start.score, ROUNDING * (abs(start.score) + abs(end.score)))

    def missing(self, attribution: Tensor) -> float:
        return abs(float(attribution.sum(dtype=torch.float64)) - self.of_score)


@functools.lru_cache(maxsize=32)
def _gauss_legendre(n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return nodes in (0, 1) and weights, by Newton's iteration for the roots of the Legendre polynomial.

    numpy computes eigenvalues of the companion matrix, which takes O(n³) for an n that callers choose.
    """
    x = -np.cos(np.pi * (np.arange(n) + 0.75) / (n + 0.5))
    slope = np.ones(n)
    for _ in range(NEWTON_STEPS):
        before, value = np.ones(n), x
        for k in range(2, n + 1):
            before, value = value, ((2 * k - 1) * x * value - (k - 1) * before) / k
        slope = n * (x * value - before) / (x * x - 1)
        x = x - value / slope
    return (1 + x) / 2, 1 / ((1 - x * x) * slope * slope)


def _add(total: Tensor, gradient: Tensor | None, weight: float) -> None:
    assert gradient is not None  # noqa: S101
    total.add_(gradient.to(total.dtype), alpha=weight)
