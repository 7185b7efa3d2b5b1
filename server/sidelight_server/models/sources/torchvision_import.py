"""Imports torchvision, which other packages import, beside a CPU build of torch.

Its wheel from the package index is made for another build: its compiled operators do not load, and then two names that
its own modules look up are missing. No classifier needs either operator, so the names are enough.
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
        # torch annotates neither of these.
        _names = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in _MISSING:
            _names.define(schema)  # type: ignore[no-untyped-call]
