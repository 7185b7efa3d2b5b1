"""`python:package.module:factory`: a function of the operator that returns a module or a `ModelSpec`.

It may have a file of weights: safetensors, or a `.pt` file read weights-only. Neither runs code.
"""

import importlib
import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from .loading import cause, source_errors

FORM = "python:package.module:factory"
PICKLED = (".pt", ".pth", ".bin")


def load(location: str, weights: Path | None) -> ModelSpec:
    """Call the factory; load the weights into its module."""
    source = f"python:{location}"
    module_name, _, factory_name = location.partition(":")
    if not module_name or not factory_name:
        raise ConfigurationError(f'model: got "{source}", expected "{FORM}"')
    made = _call(source, module_name, factory_name)
    spec = made if isinstance(made, ModelSpec) else ModelSpec(module=made) if isinstance(made, nn.Module) else None
    if spec is None or not isinstance(spec.module, nn.Module):
        raise ConfigurationError(
            f"model: {source} returned {type(made).__name__}, expected a torch.nn.Module or a ModelSpec"
        )
    if weights is not None:
        _load_weights(spec.module, weights)
    return spec if spec.name else spec.replace(name=module_name.rpartition(".")[2])


def _call(source: str, module_name: str, factory_name: str) -> object:
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard exits
        raise ConfigurationError(
            f'model: cannot import "{module_name}" for {source}: {type(error).__name__}: {cause(error)}'
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ConfigurationError(f'model: "{module_name}" has no factory "{factory_name}" (from {source})')
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"model: {source} raised {type(error).__name__}: {cause(error)}") from error


def _load_weights(module: nn.Module, path: Path) -> None:
    """Load the weights in a file into a module. Raises `ConfigurationError` if they do not fit.

    The module's tensors are replaced, not written to, because a factory may return the module that already serves. They
    are copies, because safetensors maps its file, and access to a mapped file that was truncated kills the process.
    """
    with source_errors("weights", path):
        own, state = module.state_dict(), _read_weights(path)
        module.load_state_dict({name: _like(each, own.get(name)) for name, each in state.items()}, assign=True)


def _like(value: Tensor, own: Tensor | None) -> Tensor:
    if isinstance(value, Tensor) and isinstance(own, Tensor):
        return value.to(own.device, own.dtype, copy=True)
    return value


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix not in PICKLED:
        raise ValueError(f'got "{path.suffix}", expected .safetensors, or a weights-only .pt, .pth or .bin')
    with warnings.catch_warnings(action="ignore"):  # about the pickle protocol: irrelevant if it loads
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"holds {type(state).__name__}, expected a state dict")
    return state


def files(location: str, weights: Path | None) -> tuple[Path, ...]:
    """Return the weights file only: imported code is not imported again."""
    return (weights,) if weights else ()
