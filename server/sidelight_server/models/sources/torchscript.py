"""`torchscript:FILE`: a module compiled by `torch.jit`.

A script is a program. Loading does not run it, but serving does, with the server's permissions; TorchScript can, for
example, access files. Serve only scripts from trusted authors. Other file sources contain no code.
"""

import warnings
from pathlib import Path

import torch

from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from .loading import only_file, source_errors

FORM = "torchscript:FILE"


def load(location: str, weights: Path | None) -> ModelSpec:
    """Load the module in a file, with its required labels argument if it has one."""
    path = only_file(FORM, location, weights)
    with source_errors("model", path):
        # torch warns that scripts are deprecated, which an operator cannot change.
        with warnings.catch_warnings(action="ignore"):
            # Neither this function nor its replacement has type annotations.
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        for each in module.parameters():
            each.requires_grad_(False)  # not shared with anyone; copies of a script's weights cannot be frozen later
        return ModelSpec(module=module.eval(), name=path.stem, label_argument=_label(module))


def _label(module: torch.jit.ScriptModule) -> str | None:
    """Return the one required input of a script besides its images, from its schema."""
    images, *others = list(module._c._get_method("forward").schema.arguments)[1:] or [None]
    if images is None:
        raise ConfigurationError("the script takes no input, expected images")
    demanded = [each for each in others if each is not None and not each.has_default_value()]
    if not demanded:
        return None
    if len(demanded) > 1 or str(demanded[0].type) != "Tensor":
        names = ", ".join(each.name for each in demanded)
        raise ConfigurationError(f"the script also requires {names}, expected nothing else but labels")
    return str(demanded[0].name)


def files(location: str, weights: Path | None) -> tuple[Path, ...]:
    """Return the file."""
    return (Path(location),)
