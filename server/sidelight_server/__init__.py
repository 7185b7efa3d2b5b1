"""The attribution server: it owns a PyTorch image model and tells which pixels decided each prediction.

`sidelight-server --model python:package.module:factory` runs one; `serve(module)` runs one in this process, on a fresh
socket; `Engine` does without gRPC.
"""

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
