"""Weights from a file: safetensors, or a `.pt` read weights-only. Neither can carry code."""

import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from .loading import refusing

PICKLED = (".pt", ".pth", ".bin")


def load_into(module: nn.Module, path: Path) -> None:
    """Give a module the weights in a file. `ConfigurationError` says what does not fit.

    Its tensors are replaced, not written to: a factory may return the module that serves already. Copied they are all
    the same, for safetensors maps its file, and what is mapped ends the process if somebody cuts the file short.
    """
    with refusing("weights", path):
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
    with warnings.catch_warnings(action="ignore"):  # about the pickle protocol: what matters is whether it loads
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"holds {type(state).__name__}, expected a state dict")
    return state
