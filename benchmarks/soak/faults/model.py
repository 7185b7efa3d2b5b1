"""A model that fails on marked inputs."""

import numpy as np
import sidelight_server
import torch
from torch import Tensor, nn

from ...support.held import without_reserve

SIZE = 16
FAULTS = ("raises", "is not finite", "has no memory", "exits", "gives another shape")
MODEL = "python:benchmarks.soak.faults.model:moody"


class Moody(nn.Module):
    """A small CNN that fails on inputs that begin with 1001, 1002, …: one number for each of `FAULTS`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        first = x.detach().flatten(1)[:, 0]
        moods = set(first.tolist())
        if 1001.0 in moods:
            raise RuntimeError("in a bad mood")
        if 1003.0 in moods:
            raise MemoryError
        if 1004.0 in moods:
            raise SystemExit(3)
        if 1005.0 in moods:
            return out[:, None, None, None]
        return out * torch.where(first == 1002.0, torch.nan, 1.0)[:, None]


def moody() -> sidelight_server.ModelSpec:
    """Return the model, for `MODEL`."""
    without_reserve()
    return sidelight_server.ModelSpec(Moody(), input_size=(3, SIZE, SIZE), name="moody")


def images(n: int, seed: int = 0) -> np.ndarray:
    """Return n model-ready examples."""
    return np.random.default_rng(seed).standard_normal((n, 3, SIZE, SIZE)).astype(np.float32)
