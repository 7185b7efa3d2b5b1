"""A module that waits at a gate, so that requests stay in flight until a test opens it."""

import threading

import torch
from torch import nn

from support.models import small_cnn


class Gate:
    """A module waits at it while it is shut; it counts the rows that passed. All copies of the module share it."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.n_rows = 0
        self._open = threading.Event()
        self._open.set()

    def __deepcopy__(self, memo: object) -> "Gate":
        return self

    def shut(self) -> None:
        self.reached.clear()
        self.n_rows = 0
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def wait(self, n_rows: int) -> None:
        self.n_rows += n_rows
        self.reached.set()
        assert self._open.wait(30)


class Gated(nn.Module):
    """The small CNN behind a gate."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate
        self.inner = small_cnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.gate.wait(len(x))
        return self.inner(x)
