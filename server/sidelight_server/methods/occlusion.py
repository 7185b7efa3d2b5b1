"""Perturbation methods: occlusion and RISE hide parts of the example and observe the score. No gradients."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import InvalidArgument
from . import random
from .baseline import ZERO, Baseline, Given
from .channels import Channels
from .method import (
    ROUNDING_STEPS,
    Example,
    Method,
    Outcome,
    RowOutput,
    Shape,
    Steps,
    Sweep,
    check_at_least,
    check_in_open_unit,
)
from .welford import accumulator

LEAST_PROBABILITY = 1e-6  # maps are divided by it


@dataclass(frozen=True, slots=True)
class Occlusion(Method):
    """The drop of the score when a window is hidden, averaged for each pixel over the windows that cover it.

    Zeiler and Fergus, 2014, "Visualizing and Understanding Convolutional Networks".
    """

    name: ClassVar[str] = "occlusion"
    needs_gradient: ClassVar[bool] = False
    window: tuple[int, int] = (16, 16)  # rows, columns
    stride: tuple[int, int] | None = None  # None: the window's own size
    baseline: Baseline = ZERO

    def __post_init__(self) -> None:
        for name, size, step in zip(("height", "width"), self.window, self._stride, strict=True):
            check_at_least(f"{self.name}.window_{name}", size, 1)
            check_at_least(f"{self.name}.stride_{name}", step, 1)
            if step > size:
                raise InvalidArgument(
                    f"method.{self.name}.stride_{name}: got {step}, expected at most window_{name}, {size}: "
                    "pixels between the windows would have no value"
                )

    @property
    def given_baselines(self) -> NDArray[np.generic] | None:
        return self.baseline.array if isinstance(self.baseline, Given) else None

    @property
    def largest_baseline(self) -> float:
        return self.baseline.largest

    @property
    def _stride(self) -> tuple[int, int]:
        return self.stride or self.window

    def check(self, shape: Shape, n_examples: int) -> None:
        for name, size, length in zip(("height", "width"), self.window, shape[1:], strict=True):
            if size > length:
                raise InvalidArgument(f"method.{self.name}.window_{name}: got {size}, expected at most {length}")
        self.baseline.check(shape, n_examples)

    def rows(self, shape: Shape) -> int:
        """Return the number of windows plus one for the example itself."""
        return 1 + math.prod(self._counts(shape[1:]))

    def run(self, example: Example) -> Steps:
        """Slide the window; the last ones in each direction may extend beyond the edge."""
        whole = yield from example.evaluate(gradient=False)
        baseline = self.baseline.of(example)
        height, width = example.x.shape[1:]
        fall, cover = (accumulator(example.x[0]) for _ in range(2))  # [H, W]
        scores = [whole.score]
        n_rows, n_columns = self._counts((height, width))

        def window(k: int) -> tuple[slice, slice]:
            top, left = k // n_columns * self._stride[0], k % n_columns * self._stride[1]
            return slice(top, top + self.window[0]), slice(left, left + self.window[1])

        def hidden(k: int) -> Tensor:
            copy = example.x.clone()
            rows, columns = window(k)
            copy[:, rows, columns] = baseline[:, rows, columns]
            return copy

        def fold(k: int, output: RowOutput) -> None:
            scores.append(output.score)
            fall[window(k)] += whole.score - output.score
            cover[window(k)] += 1

        yield Sweep(n_rows * n_columns, hidden, fold, gradient=False)
        return Outcome(fall / cover, is_negligible=_are_equal(scores, step=example.step))

    def may_be_negative(self, channels: Channels) -> bool:
        """True: hiding a window may raise the score."""
        return True

    def _counts(self, size: tuple[int, ...]) -> tuple[int, int]:
        """Return the number of window rows and columns needed to cover the image."""
        rows, columns = (
            1 + math.ceil(max(0, length - window) / step)
            for length, window, step in zip(size, self.window, self._stride, strict=True)
        )
        return rows, columns


@dataclass(frozen=True, slots=True)
class RISE(Method):
    """The mean of random soft masks, weighted by the score of the example under each mask.

    Petsiuk, Das and Saenko, 2018, "RISE: Randomized Input Sampling for Explanation of Black-box Models".
    """

    name: ClassVar[str] = "rise"
    needs_gradient: ClassVar[bool] = False
    masks: int = 1000
    cells: int = 7  # along each side of the grid
    keep_probability: float = 0.5  # the chance that a cell is shown
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(f"{self.name}.masks", self.masks, 1)
        check_at_least(f"{self.name}.cells", self.cells, 1)
        check_in_open_unit(f"{self.name}.keep_probability", self.keep_probability)
        check_at_least(f"{self.name}.keep_probability", self.keep_probability, LEAST_PROBABILITY)

    def check(self, shape: Shape, n_examples: int) -> None:
        if self.cells > min(shape[1:]):
            raise InvalidArgument(f"method.{self.name}.cells: got {self.cells}, expected at most {min(shape[1:])}")

    def rows(self, shape: Shape) -> int:
        """Return the number of masks plus one for the example itself."""
        return self.masks + 1

    def run(self, example: Example) -> Steps:
        total = accumulator(example.x[0])  # [H, W]
        scores: list[float] = []
        masks: dict[int, Tensor] = {}  # of the rows at the device

        def shown(k: int) -> Tensor:
            masks[k] = mask = self.mask(k, total)
            return example.x * mask.to(example.x.dtype)

        def fold(k: int, output: RowOutput) -> None:
            scores.append(output.score)
            total.add_(masks.pop(k), alpha=output.score)

        yield Sweep(self.masks, shown, fold, gradient=False)
        are_equal = len(scores) > 1 and _are_equal(scores, step=example.step)
        return Outcome(total / (self.masks * self.keep_probability), is_negligible=are_equal)

    def mask(self, k: int, like: Tensor) -> Tensor:
        """Return the k-th mask, [H, W] in [0, 1]: a random grid, upsampled bilinearly, cropped at a random offset."""
        chosen = random.generator(self.seed, "rise", k, device=torch.device("cpu"))
        grid = torch.rand(self.cells, self.cells, generator=chosen) < self.keep_probability
        cell = [math.ceil(length / self.cells) for length in like.shape]
        enlarged = nn.functional.interpolate(
            grid[None, None].to(like.device, like.dtype),
            size=[(self.cells + 1) * length for length in cell],
            mode="bilinear",
            align_corners=False,
        )[0, 0]
        top, left = (int(torch.randint(length, (), generator=chosen)) for length in cell)
        return enlarged[top : top + like.shape[0], left : left + like.shape[1]]

    def may_be_negative(self, channels: Channels) -> bool:
        """True: a logit may be negative."""
        return True


def _are_equal(scores: list[float], *, step: float) -> bool:
    """Return whether scores differ by no more than rounding error.

    The kind of score is unknown here, so the error is taken relative to |s| or |1 − s|, whichever is smaller: a
    probability near 1 is as precise as its distance from 1.
    """
    largest = max(min(abs(score), abs(1 - score)) for score in scores)
    return max(scores) - min(scores) <= ROUNDING_STEPS * step * largest
