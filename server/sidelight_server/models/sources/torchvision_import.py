"""Imports torchvision, which other packages depend on, with a CPU build of torch.

The torchvision wheel on PyPI is built for CUDA builds of torch: its compiled operators do not load, so two operators
that its modules refer to are missing. No classifier uses them, so it is sufficient to define their names.
"""

import importlib
from types import ModuleType

import torch

_names: torch.library.Library | None = None
_MISSING = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_with_torchvision(name: str) -> ModuleType:
    """Import a module that imports torchvision, or torchvision itself. Raises what the import raises."""
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _define_names()
        return importlib.import_module(name)


def _define_names() -> None:
    global _names
    if _names is None:
        # Neither function has type annotations.
        _names = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in _MISSING:
            _names.define(schema)  # type: ignore[no-untyped-call]
