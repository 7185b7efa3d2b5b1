"""Results: answers and their parts, server information, saved answers and replay.

May import `methods` and everything below.
"""

from .attribution import Attribution
from .comparison import Difference, Replay, Replayed
from .example import ExampleAttribution
from .server_info import CancellationStats, Limits, ModelInfo, Preprocessing, ServerInfo, SharedMemory, WarmupEntry
from .types import Convergence, ExplainedTarget, Failure, Geometry, Prediction, Provenance, Timing

__all__ = [
    "Attribution",
    "CancellationStats",
    "Convergence",
    "Difference",
    "ExampleAttribution",
    "ExplainedTarget",
    "Failure",
    "Geometry",
    "Limits",
    "ModelInfo",
    "Prediction",
    "Preprocessing",
    "Provenance",
    "Replay",
    "Replayed",
    "ServerInfo",
    "SharedMemory",
    "Timing",
    "WarmupEntry",
]
