"""Ray: batch jobs on Ray Data, with an engine in each actor.

The topmost layer: it may import every other package, and none imports it. Inside, `import ray` is Ray's own package.
"""

from .explainer import Explainer

__all__ = ["Explainer"]
