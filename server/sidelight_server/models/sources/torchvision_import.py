"""Imports torchvision, which other packages depend on, with a CPU build of torch.

The torchvision wheel on PyPI is built for CUDA builds of torch: its compiled operators do not load, so two operators
that its modules refer to are missing. No classifier uses them, so it is sufficient to define their names.
"""

import functools
import importlib
from types import ModuleType

import torch

_MISSING = ("nms", "qnms")


def import_with_torchvision(name: str) -> ModuleType:
    """Import a module that imports torchvision, or torchvision itself. Raises what the import raises."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _define_names()
        return importlib.import_module(name)


@functools.cache  # which keeps the library: the names exist as long as it does
def _define_names() -> torch.library.Library:
    # Neither function has type annotations.
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in _MISSING:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library
