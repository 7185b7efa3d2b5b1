"""The attribution server: explains the predictions of PyTorch image models over gRPC.

`sidelight-server --model python:package.module:factory` runs a server; `serve(module)` runs one in this process, on a
new socket; `Engine` works without gRPC.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .app.embedded import EmbeddedServer, serve
    from .config.settings import Settings
    from .config.spec import ModelSpec
    from .domain import (
        Answer,
        Contrast,
        Convergence,
        Dense,
        ExampleFailure,
        ExplainedTarget,
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
    from .engine.engine import Engine
    from .errors import ConfigurationError, SidelightError
    from .methods import (
        RISE,
        ExpectedGradients,
        GradCAM,
        Gradient,
        GuidedBackpropagation,
        IntegratedGradients,
        LayerGradientXActivation,
        Occlusion,
        SmoothGrad,
    )
    from .methods.baseline import Black, Blurred, Constant, Given, MeanColor
    from .methods.channels import Channels, Magnitude
    from .methods.integrated_gradients import Rule
    from .methods.smoothgrad import Statistic

# The modules of the names in `__all__`, light ones first. Each is imported on first use, because a health check needs
# none of them, nor torch.
_HOMES = (
    "errors", "config.settings", "domain", "methods", "methods.baseline", "methods.channels",
    "methods.integrated_gradients", "methods.smoothgrad", "config.spec", "engine.engine", "app.embedded",
)  # fmt: skip

# The import names of the packages of the extra `server`.
_EXTRA = ("torch", "pydantic_settings", "safetensors", "prometheus_client", "grpc_health", "grpc_reflection")


def missing_package() -> str | None:
    """Return the first package of the extra `server` that is not installed, or None. Imports none of them."""
    return next((package for package in _EXTRA if importlib.util.find_spec(package) is None), None)


def __getattr__(name: str) -> object:
    """Import a public name on first use. Raises `ModuleNotFoundError` without the extra `server`."""
    if name in __all__:
        if missing := missing_package():
            raise ModuleNotFoundError(f"sidelight_server needs {missing}: pip install 'sidelight[server]'")
        for home in _HOMES:
            module = importlib.import_module(f".{home}", __name__)
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "RISE",
    "Answer",
    "Black",
    "Blurred",
    "Channels",
    "ConfigurationError",
    "Constant",
    "Contrast",
    "Convergence",
    "Dense",
    "EmbeddedServer",
    "Engine",
    "ExampleFailure",
    "ExpectedGradients",
    "ExplainedTarget",
    "Explanation",
    "Files",
    "Given",
    "GradCAM",
    "Gradient",
    "GuidedBackpropagation",
    "IntegratedGradients",
    "LayerGradientXActivation",
    "Magnitude",
    "MeanColor",
    "ModelSpec",
    "Occlusion",
    "PerExample",
    "Predicted",
    "Provenance",
    "Region",
    "Request",
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
