"""Expected gradients, also called GradientSHAP: gradients at random points on paths from random baselines."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidArgument
from . import random
from .baseline import check_finite, largest, tensor_like
from .method import Example, Improved, Method, Outcome, RowOutput, Shape, Steps, Sweep, check_at_least
from .welford import BLOCK, Moments


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedGradients(Method):
    """The mean of gradient times difference over random baselines, random points of the path, and noise.

    Erion, Janizek, Sturmfels, Lundberg and Lee, 2021, "Improving performance of deep learning models with axiomatic
    attribution priors and expected gradients".
    """

    name: ClassVar[str] = "expected_gradients"
    samples: int = 50
    baselines: NDArray[np.floating] | None = None  # [M, C, H, W]; None: zeros
    noise_level: float = 0.0  # standard deviation of noise added to the example, as a share of its range
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(f"{self.name}.samples", self.samples, 1)
        check_at_least(f"{self.name}.noise_level", self.noise_level, 0)
        if self.baselines is not None:
            check_finite(f"{self.name}.baselines", self.baselines)

    @property
    def given_baselines(self) -> NDArray[np.generic] | None:
        return self.baselines

    @property
    def largest_baseline(self) -> float:
        return 0.0 if self.baselines is None else largest(self.baselines)

    def check(self, shape: Shape, n_examples: int) -> None:
        if self.baselines is not None and (not len(self.baselines) or self.baselines.shape[1:] != shape):
            raise InvalidArgument(
                f"method.{self.name}.baselines: shape {list(self.baselines.shape)}, expected [M, {str(list(shape))[1:]}"
                " with M at least 1"
            )

    def rows(self, shape: Shape) -> int:
        """Return the number of samples plus one for the example itself."""
        return self.samples + 1

    def run(self, example: Example) -> Steps:
        spread = self.noise_level * (example.x.max() - example.x.min())
        moments = Moments(example.x)

        differences: dict[int, Tensor] = {}  # of the rows at the device, from the baseline to the noisy example

        def point(k: int) -> Tensor:
            end = example.x
            if self.noise_level:
                end = end + spread * random.noise(example.x, self.seed, "noise", k)
            start = self._baseline(k, example.x)
            differences[k] = difference = end - start
            return start + random.uniform(self.seed, "place", k) * difference

        def fold(k: int, output: RowOutput) -> None:
            assert output.gradient is not None  # noqa: S101
            moments.add(output.gradient * differences.pop(k))

        block = BLOCK if example.is_watched else self.samples
        while moments.n < self.samples:
            begin = moments.n
            yield Sweep(
                min(block, self.samples - begin),
                lambda k, begin=begin: point(begin + k),  # type: ignore[misc]
                lambda k, output, begin=begin: fold(begin + k, output),  # type: ignore[misc]
            )
            if example.is_watched and moments.n < self.samples:
                yield Improved(Outcome(moments.mean.clone(), moments.error()))
        return Outcome(moments.mean, moments.error())

    def _baseline(self, k: int, like: Tensor) -> Tensor:
        if self.baselines is None:
            return torch.zeros_like(like)
        return tensor_like(self.baselines[random.integer(len(self.baselines), self.seed, "baseline", k)], like)
