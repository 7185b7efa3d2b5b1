"""Ray: batch jobs on Ray Data with an engine in each actor, and the unary service on Ray Serve.

The topmost layer: it may import every other package, and none imports it. Inside, `import ray` is Ray's own package.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .explainer import Explainer
    from .serving import app

_HOMES = {"Explainer": ".explainer", "app": ".serving"}


def __getattr__(name: str) -> object:
    """Import a public name on first use: jobs need no Ray Serve."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Explainer", "app"]
