"""SmoothGrad, SmoothGrad² and VarGrad: a statistic of a base method over noisy copies of the example."""

import enum
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidArgument
from . import random
from .channels import Magnitude
from .gradient import GRADIENT, Gradient
from .integrated_gradients import IntegratedGradients
from .method import (
    Example,
    Improved,
    Method,
    Outcome,
    Probe,
    Shape,
    Steps,
    Sweep,
    check_at_least,
    check_steps_or_tolerance,
)
from .welford import BLOCK, Moments

MIN_DRAWS = 2 * BLOCK  # least number with a tolerance: fewer may agree by chance, within one linear piece of the model


class Statistic(enum.Enum):
    """The statistic over the samples."""

    MEAN = "mean"
    MEAN_SQUARE = "mean_square"
    VARIANCE = "variance"


@dataclass(frozen=True, slots=True)
class SmoothGrad(Method):
    """A statistic of a base method over copies of the example with Gaussian noise.

    Smilkov, Thorat, Kim, Viégas and Wattenberg, 2017, "SmoothGrad: removing noise by adding noise" (mean). Hooker,
    Erhan, Kindermans and Kim, 2019, "A Benchmark for Interpretability Methods in Deep Neural Networks" (mean square).
    Adebayo, Gilmer, Goodfellow and Kim, 2018, "Local Explanation Methods for Deep Neural Networks Lack Sensitivity to
    Parameter Values" (variance).
    """

    name: ClassVar[str] = "smoothgrad"
    samples: int = 25
    noise_level: float = 0.15  # standard deviation, as a share of the example's range, or absolute
    absolute_noise: bool = False
    seed: int = 0
    statistic: Statistic = Statistic.MEAN
    tolerance: float | None = None  # stop once the standard error's L2 norm over the mean's is at most this
    max_rows: int = 300  # rows of one example, with a tolerance, including the example itself
    base: Gradient | IntegratedGradients = GRADIENT

    def __post_init__(self) -> None:
        check_steps_or_tolerance(self.name, self.samples, self.tolerance, least=1, counted="samples")
        check_at_least(f"{self.name}.noise_level", self.noise_level, 0)
        check_at_least(f"{self.name}.max_rows", self.max_rows, 1)
        if self.magnitude is Magnitude.SQUARED:
            raise InvalidArgument(
                f"method.{self.name}.base: a squared gradient, expected another: the statistic mean_square squares "
                "each draw"
            )

    @property
    def magnitude(self) -> Magnitude | None:
        return self.base.magnitude

    @property
    def probe(self) -> Probe:
        return self.base.probe

    @property
    def given_baselines(self) -> NDArray[np.generic] | None:
        return self.base.given_baselines

    @property
    def largest_baseline(self) -> float:
        return self.base.largest_baseline

    def check(self, shape: Shape, n_examples: int) -> None:
        """Check the base, and that `max_rows` allows one sample."""
        self.base.check(shape, n_examples)
        if self.tolerance is not None:
            check_at_least(f"{self.name}.max_rows", self.max_rows, 1 + self.base.rows(shape))

    def rows(self, shape: Shape) -> int:
        """Return the rows of all samples plus one for the example itself."""
        return self.max_rows if self.tolerance else 1 + self.samples * self.base.rows(shape)

    def run(self, example: Example) -> Steps:
        """Fold samples until there are enough or the standard error meets the tolerance."""
        spread = self.noise_level if self.absolute_noise else self.noise_level * (example.x.max() - example.x.min())
        moments = Moments(example.x)
        limit = self.samples or (self.max_rows - 1) // self._base_rows(example)
        block = BLOCK if self.tolerance or example.is_watched else limit
        while True:
            yield from self._draw(example, spread, moments, min(block, limit - moments.n))
            error = moments.error()
            is_met = None
            if self.tolerance is not None:
                is_met = moments.n >= MIN_DRAWS and error is not None and error <= self.tolerance
            if is_met or moments.n >= limit:
                break
            if example.is_watched:
                yield Improved(Outcome(self._compute_statistic(moments), error, is_met=is_met))
        return Outcome(self._compute_statistic(moments), error, is_met=is_met)

    def _draw(self, example: Example, spread: float | Tensor, moments: "Moments", count: int) -> Steps:
        begin = moments.n

        def noisy(k: int) -> Tensor:
            return example.x + spread * random.noise(example.x, self.seed, "smoothgrad", begin + k)

        if isinstance(base := self.base, Gradient):  # one row per sample, so all samples are one sweep
            yield Sweep(count, noisy, lambda _, output: moments.add(base.attribution(output)))
        else:
            for k in range(count):
                moments.add((yield from base.run(example.moved(noisy(k)))).attribution)
        return Outcome(moments.mean)

    def _base_rows(self, example: Example) -> int:
        c, h, w = example.x.shape
        return self.base.rows((c, h, w))

    def _compute_statistic(self, moments: "Moments") -> Tensor:
        match self.statistic:
            case Statistic.MEAN:
                return moments.mean.clone()
            case Statistic.MEAN_SQUARE:
                return moments.mean.square() + moments.squares / moments.n
            case Statistic.VARIANCE:
                return moments.squares / moments.n
