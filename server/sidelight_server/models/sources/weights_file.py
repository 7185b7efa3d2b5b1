"""Weights from a file: safetensors, or a `.pt` file read weights-only. Neither runs code."""

import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from .loading import source_errors

PICKLED = (".pt", ".pth", ".bin")


def load_into(module: nn.Module, path: Path) -> None:
    """Load the weights in a file into a module. Raises `ConfigurationError` if they do not fit.

    The module's tensors are replaced, not written to, because a factory may return the module that already serves. They
    are copies, because safetensors maps its file, and access to a mapped file that was truncated kills the process.
    """
    with source_errors("weights", path):
        own, state = module.state_dict(), _read(path)
        module.load_state_dict({name: _like(each, own.get(name)) for name, each in state.items()}, assign=True)


def _like(value: Tensor, own: Tensor | None) -> Tensor:
    if isinstance(value, Tensor) and isinstance(own, Tensor):
        return value.to(own.device, own.dtype, copy=True)
    return value


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix not in PICKLED:
        raise ValueError(f'got "{path.suffix}", expected .safetensors, or a weights-only .pt, .pth or .bin')
    with warnings.catch_warnings(action="ignore"):  # about the pickle protocol: irrelevant if it loads
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"holds {type(state).__name__}, expected a state dict")
    return state
