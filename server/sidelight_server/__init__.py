"""The attribution server: it owns a PyTorch image model and tells which pixels decided each prediction.

`sidelight-server --model python:package.module:factory` runs one; `serve(module)` runs one in this process, on a fresh
socket; `Engine` does without gRPC.
"""

import importlib.util

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("pydantic_settings") is None:
    raise ModuleNotFoundError("the server needs its extra: pip install 'sidelight[server]'")

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
