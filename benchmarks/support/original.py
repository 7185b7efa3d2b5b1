"""The original: PyHealth 2.1.0's `BasicGradientSaliencyMaps`, loaded without the rest of its package.

`python -m benchmarks.support.original FOLDER…` explains the images.pt of each folder by its module.pt, into maps.npy.
It runs in its own process, so that the caller's does not get the stand-ins for PyHealth's packages.
"""

import functools
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class PyHealthModel(nn.Module):
    """A classifier as the original calls it: keywords in, `{"y_prob": …}` out."""

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, image: Tensor, disease: Tensor | None = None) -> dict[str, Tensor]:
        return {"y_prob": self.logits(image).softmax(dim=1)}


@functools.cache
def original_class() -> Any:
    """Return the class. Its whole package would need two gigabytes of dependencies that the class does not use."""
    found = importlib.util.find_spec("pyhealth")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("pyhealth is not installed: make setup")
    root = Path(found.submodule_search_locations[0])
    for name, folder in {
        "pyhealth": root,
        "pyhealth.models": root / "models",
        "pyhealth.interpret": root / "interpret",
        "pyhealth.interpret.methods": root / "interpret" / "methods",
    }.items():
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    sys.modules["pyhealth.models"].BaseModel = nn.Module  # type: ignore[attr-defined]
    from pyhealth.interpret.methods.basic_gradient import BasicGradientSaliencyMaps

    return BasicGradientSaliencyMaps


def maps(module: nn.Module, images: Tensor) -> Tensor:
    """Return the original's maps, [N, H, W], of images, [N, C, H, W]."""
    explainer = original_class()(PyHealthModel(module).eval())
    result: Tensor = explainer.attribute(image=images)["image"]
    return result.detach()


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        loaded = torch.load(folder / "module.pt", weights_only=False)  # the caller's module, from its process
        np.save(folder / "maps.npy", maps(loaded, torch.load(folder / "images.pt")).numpy())
