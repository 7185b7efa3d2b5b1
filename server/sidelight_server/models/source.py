"""Sources: where a module comes from. `python:package.module:factory`, with weights from a file if wanted.

Code is loaded only from what the operator names. Weights are safetensors, or a `.pt` file read weights-only: neither
can carry code.
"""

import importlib
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .spec import ModelSpec

FORM = "python:package.module:factory"


def load(source: str, weights: Path | None = None) -> ModelSpec:
    """Return what a source's factory makes, its weights loaded. `ConfigurationError` says what went wrong."""
    kind, _, rest = source.partition(":")
    module_name, _, factory_name = rest.partition(":")
    if kind != "python" or not module_name or not factory_name:
        raise ConfigurationError(f'model: got "{source}", expected "{FORM}"')
    made = _call(source, module_name, factory_name)
    spec = made if isinstance(made, ModelSpec) else ModelSpec(made) if isinstance(made, nn.Module) else None
    if spec is None or not isinstance(spec.module, nn.Module):
        raise ConfigurationError(
            f"model: {source} returned {type(made).__name__}, expected a torch.nn.Module or a ModelSpec"
        )
    if weights is not None:
        _load_weights(spec.module, weights)
    return spec if spec.name else replace(spec, name=factory_name)


def _call(source: str, module_name: str, factory_name: str) -> object:
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script without a main guard exits
        raise ConfigurationError(
            f'model: cannot import "{module_name}" for {source}: {type(error).__name__}: {error}'
        ) from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise ConfigurationError(f'model: "{module_name}" has no factory "{factory_name}" (from {source})')
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise ConfigurationError(f"model: {source} raised {type(error).__name__}: {error}") from error


def _load_weights(module: nn.Module, path: Path) -> None:
    try:
        state = _read(path)
        module.load_state_dict(state)
    except FileNotFoundError:
        raise ConfigurationError(f"weights: {path} is not there") from None
    except pickle.UnpicklingError as error:  # torch's own message advises to run the code
        raise ConfigurationError(
            f"weights: {path}: is broken, or holds more than tensors, and code in a file is never run; "
            "expected what torch.save makes of a state_dict()"
        ) from error
    except Exception as error:  # torch promises no set of exceptions for what is in a file
        cause = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(f"weights: {path}: {cause[:400]}") from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if path.suffix not in (".pt", ".pth", ".bin"):
        raise ValueError(f'got "{path.suffix}", expected .safetensors, or a weights-only .pt, .pth or .bin')
    with warnings.catch_warnings(action="ignore"):  # about the pickle protocol: what matters is whether it loads
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"holds {type(state).__name__}, expected a state dict")
    return state
