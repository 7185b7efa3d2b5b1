"""`torchscript:FILE`: a module that `torch.jit` compiled.

A script is a program: loading it runs none of it, but serving it does, and what TorchScript can do (files among it) it
may do with the server's rights. Serve only scripts whose maker you trust; the other sources hold no such thing.
"""

import warnings
from pathlib import Path

import torch

from ...config.spec import ModelSpec
from ...errors import ConfigurationError
from .loading import refuse_weights, refusing, require_file

FORM = "torchscript:FILE"


def load(place: str, weights: Path | None) -> ModelSpec:
    """Return the module in a file, and what it demands beside its images."""
    path = Path(place)
    refuse_weights(FORM, weights)
    require_file("model", path)
    with refusing("model", path):
        # torch says that scripts are deprecated, which nobody who serves one can change.
        with warnings.catch_warnings(action="ignore"):
            # torch annotates neither this function nor its replacement.
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        for each in module.parameters():
            each.requires_grad_(False)  # it is nobody else's, and copies of a script's weights cannot be frozen
        return ModelSpec(module.eval(), name=path.stem, label=_label(module))


def _label(module: torch.jit.ScriptModule) -> str | None:
    """Return the one input that a script demands beside its images, as its schema says."""
    images, *others = list(module._c._get_method("forward").schema.arguments)[1:] or [None]
    if images is None:
        raise ConfigurationError("the script takes no input, expected images")
    demanded = [each for each in others if each is not None and not each.has_default_value()]
    if not demanded:
        return None
    if len(demanded) > 1 or str(demanded[0].type) != "Tensor":
        names = ", ".join(each.name for each in demanded)
        raise ConfigurationError(f"the script also demands {names}; expected labels at most")
    return str(demanded[0].name)


def files(place: str, weights: Path | None) -> tuple[Path, ...]:
    """Return the file."""
    return (Path(place),)
