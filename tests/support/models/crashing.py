"""Models for servers that are killed, in processes of their own: factories for `python:support.models.crashing:…`."""

import os
import signal
import time

import sidelight_server
import torch
from torch import Tensor, nn

POISON = 666.0


class Poisoned(nn.Module):
    """A model that kills its server at a picture of one number."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == POISON).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner(x)


class Stalled(nn.Module):
    """A model that does not end at such a picture."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if bool((x == POISON).any()):
            time.sleep(3600)
        return self.inner(x)


def small() -> sidelight_server.ModelSpec:
    """Return a CNN that takes floating arrays of any size."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    return sidelight_server.ModelSpec(inner, name="small")


def poisoned() -> sidelight_server.ModelSpec:
    """Return the same behind the poison."""
    return sidelight_server.ModelSpec(Poisoned(small().module), name="small")


def stalled() -> sidelight_server.ModelSpec:
    """Return the same in a model that stalls."""
    return sidelight_server.ModelSpec(Stalled(small().module), name="small")
