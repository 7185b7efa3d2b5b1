"""Method options as descriptions of controls, read from the fields and types of the method classes."""

import dataclasses
import functools
import inspect
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .._inputs.enums import Channels, Score
from ..methods.baselines import NAMES, Baseline
from ..methods.method import Method
from ..methods.parsing import METHODS

BASES = ("gradient", "integrated_gradients")

_TITLES = {
    "smoothgrad": "SmoothGrad",
    "grad_cam": "Grad-CAM",
    "layer_gradient_x_activation": "Layer gradient × activation",
    "rise": "RISE",
}

Control = dict[str, object]


@functools.cache
def describe() -> dict[str, Any]:
    """Return the methods with their options, and the choices of score and channels, as values for JSON."""
    return {
        "methods": [_method(name, kind) for name, kind in METHODS.items()],
        "scores": get_args(Score),
        "channels": get_args(Channels),
    }


def _method(name: str, kind: type[Method]) -> dict[str, Any]:
    summary, _, details = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    hints = get_type_hints(kind)
    options = (_option(field.name, hints[field.name], field.default) for field in dataclasses.fields(kind))
    return {
        "name": name,
        "title": _TITLES.get(name, name.replace("_", " ").capitalize()),
        "summary": " ".join(summary.split()),
        "details": " ".join(details.split()).replace("`", ""),
        "options": [each for each in options if each is not None],
    }


def _option(name: str, hint: Any, default: object) -> Control | None:
    """Return the control of an option; None for one that only takes an array."""
    if name == "layer":
        return {"name": name, "kind": "layer", "default": ""}
    if name == "base":
        return {"name": name, "kind": "choice", "choices": BASES, "default": BASES[0]}
    if hint == Baseline:
        return {"name": name, "kind": "choice", "choices": NAMES, "default": default}
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    is_optional = type(None) in members
    for member in members:
        if get_origin(member) is Literal:
            choices = get_args(member)
            return {"name": name, "kind": "choice", "choices": (None, *choices)[not is_optional :], "default": default}
        if member is bool:
            return {"name": name, "kind": "flag", "default": default}
        if member in (int, float):
            kind = "integer" if member is int else "number"
            return {"name": name, "kind": kind, "optional": is_optional, "default": default}
    return None
