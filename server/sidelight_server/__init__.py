"""The attribution server: it owns a PyTorch image model and tells which pixels decided each prediction.

`sidelight-server --model python:package.module:factory` runs one; `serve(module)` runs one in this process, on a fresh
socket; `Engine` does without gRPC.
"""

import importlib.util

if importlib.util.find_spec("torch") is None or importlib.util.find_spec("pydantic_settings") is None:
    raise ModuleNotFoundError("the server needs its extra: pip install 'sidelight[server]'")

from .attribution import (
    Answer,
    Channels,
    ExampleFailure,
    Explanation,
    Files,
    Gradient,
    Magnitude,
    PerExample,
    Predicted,
    Provenance,
    Request,
    Score,
    Timing,
)
from .config import Settings
from .embedded import serve
from .engine import Engine
from .errors import ConfigurationError, SidelightError
from .models.spec import ModelSpec

__all__ = [
    "Answer",
    "Channels",
    "ConfigurationError",
    "Engine",
    "ExampleFailure",
    "Explanation",
    "Files",
    "Gradient",
    "Magnitude",
    "ModelSpec",
    "PerExample",
    "Predicted",
    "Provenance",
    "Request",
    "Score",
    "Settings",
    "SidelightError",
    "Timing",
    "serve",
]
