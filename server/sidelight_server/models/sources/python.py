"""`python:package.module:factory`: a function of the operator that returns a module or a `ModelSpec`."""

import importlib
from pathlib import Path

from torch import nn

from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from . import weights_file
from .loading import cause

FORM = "python:package.module:factory"


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
        weights_file.load_into(spec.module, weights)
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


def files(location: str, weights: Path | None) -> tuple[Path, ...]:
    """Return the weights file only: imported code is not imported again."""
    return (weights,) if weights else ()
