"""Sources for the tests of loading and reloading: `python:support.models.reloadable:net`."""

import weakref
from pathlib import Path

import safetensors.torch
from sidelight_server import ModelSpec
from torch import nn

from support.models import small_cnn

SOURCE = "python:support.models.reloadable:net"
SIZE = (3, 32, 32)

alive: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()  # every network that a factory made and that is still there


def net() -> ModelSpec:
    """A network whose weights come from a file."""
    module = small_cnn()
    alive.add(module)
    return ModelSpec(module, input_size=SIZE)


def cached() -> ModelSpec:
    """The same network every time, as a factory that remembers it returns."""
    return ModelSpec(_CACHED, input_size=SIZE)


_CACHED = small_cnn()


def write_weights(path: Path, *, seed: int) -> None:
    """Write a network's weights to a file, atomically, as a deployment does."""
    beside = path.with_suffix(".new")
    safetensors.torch.save_file(small_cnn(seed=seed).state_dict(), beside)
    beside.replace(path)
