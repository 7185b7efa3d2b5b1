"""Answers and what they hold: attributions, server information, saved answers and their replay.

May import `_options`, `methods`, `_inputs`, `visualization` and `exceptions`.
"""

from .attribution import Attribution
from .replay import Difference, Replay, Replayed
from .server_info import Limits, ModelInfo, Preprocessing, ServerInfo, SharedMemory, Stops, WarmupEntry
from .types import Convergence, Explained, Failure, Geometry, Prediction, Provenance, Timing

__all__ = [
    "Attribution",
    "Convergence",
    "Difference",
    "Explained",
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
    "Stops",
    "Timing",
    "WarmupEntry",
]
