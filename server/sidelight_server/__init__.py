"""The attribution server: it owns a PyTorch image model and tells which pixels decided each prediction.

`sidelight-server --model python:package.module:factory` runs one; `serve(module)` runs one in this process, on a fresh
socket; `Engine` does without gRPC.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("pydantic_settings") is None:
    raise ModuleNotFoundError("the server needs its extra: pip install 'sidelight[server]'")

if TYPE_CHECKING:
    from .attribution import (
        Answer,
        Contrast,
        Convergence,
        Dense,
        ExampleFailure,
        Explained,
        Explanation,
        Files,
        PerExample,
        Predicted,
        Provenance,
        Region,
        Request,
        Score,
        Timing,
        TopK,
    )
    from .config import Settings
    from .embedded import serve
    from .engine import Engine
    from .errors import ConfigurationError, SidelightError
    from .methods import (
        ExpectedGradients,
        GradCam,
        Gradient,
        GuidedBackpropagation,
        IntegratedGradients,
        LayerGradientTimesActivation,
        Occlusion,
        Rise,
        SmoothGrad,
    )
    from .methods.baseline import Black, Blurred, Constant, Given, MeanColour
    from .methods.channels import Channels, Magnitude
    from .methods.path import Rule
    from .methods.smoothgrad import Statistic
    from .models.spec import ModelSpec

# Where each name stands. They are imported when they are asked for: a probe needs none of them, and not torch either.
_HOMES = {
    "Answer": "attribution",
    "Black": "methods.baseline",
    "Blurred": "methods.baseline",
    "Channels": "methods.channels",
    "ConfigurationError": "errors",
    "Constant": "methods.baseline",
    "Contrast": "attribution",
    "Convergence": "attribution",
    "Dense": "attribution",
    "Engine": "engine",
    "ExampleFailure": "attribution",
    "ExpectedGradients": "methods",
    "Explained": "attribution",
    "Explanation": "attribution",
    "Files": "attribution",
    "Given": "methods.baseline",
    "GradCam": "methods",
    "Gradient": "methods",
    "GuidedBackpropagation": "methods",
    "IntegratedGradients": "methods",
    "LayerGradientTimesActivation": "methods",
    "Magnitude": "methods.channels",
    "MeanColour": "methods.baseline",
    "ModelSpec": "models.spec",
    "Occlusion": "methods",
    "PerExample": "attribution",
    "Predicted": "attribution",
    "Provenance": "attribution",
    "Region": "attribution",
    "Request": "attribution",
    "Rise": "methods",
    "Rule": "methods.path",
    "Score": "attribution",
    "Settings": "config",
    "SidelightError": "errors",
    "SmoothGrad": "methods",
    "Statistic": "methods.smoothgrad",
    "Timing": "attribution",
    "TopK": "attribution",
    "serve": "embedded",
}


def __getattr__(name: str) -> object:
    """Return a public name from the module that it stands in."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Answer",
    "Black",
    "Blurred",
    "Channels",
    "ConfigurationError",
    "Constant",
    "Contrast",
    "Convergence",
    "Dense",
    "Engine",
    "ExampleFailure",
    "ExpectedGradients",
    "Explained",
    "Explanation",
    "Files",
    "Given",
    "GradCam",
    "Gradient",
    "GuidedBackpropagation",
    "IntegratedGradients",
    "LayerGradientTimesActivation",
    "Magnitude",
    "MeanColour",
    "ModelSpec",
    "Occlusion",
    "PerExample",
    "Predicted",
    "Provenance",
    "Region",
    "Request",
    "Rise",
    "Rule",
    "Score",
    "Settings",
    "SidelightError",
    "SmoothGrad",
    "Statistic",
    "Timing",
    "TopK",
    "serve",
]
