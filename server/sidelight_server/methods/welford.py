"""Running mean and variance by Welford's recurrence, in at least float32."""

import torch
from torch import Tensor

BLOCK = 8  # samples between two checks of the standard error


def accumulator(like: Tensor) -> Tensor:
    """Return zeros of a tensor's shape in at least float32: in bfloat16, 256 + 1 is 256."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


class Moments:
    """Running mean and variance of tensors, by Welford's recurrence: plain sums of squares would cancel."""

    def __init__(self, like: Tensor) -> None:
        self.n = 0
        self.mean = accumulator(like)
        self.squares = accumulator(like)  # the sum of (each − mean)²

    def add(self, value: Tensor) -> None:
        self.n += 1
        before = value - self.mean
        self.mean.add_(before, alpha=1 / self.n)
        self.squares.addcmul_(before, value - self.mean)

    def error(self) -> float | None:
        """Return the L2 norm of the standard error relative to that of the mean; None before the second value."""
        if self.n < 2:
            return None
        deviation = float((self.squares.sum(dtype=torch.float64) / (self.n - 1) / self.n).sqrt())
        size = float(torch.linalg.vector_norm(self.mean, dtype=torch.float64))
        return deviation / size if size else (0.0 if not deviation else float("inf"))
