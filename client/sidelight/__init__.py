"""Which pixels decided each prediction: the client of a Sidelight server.

with sidelight.connect("unix:/run/sidelight.sock") as client:
    answer = client.attribute("cat.png")
    answer.overlay(0).save("why.png")
"""

from . import aio
from ._aio import AsyncClient
from ._client import Client, connect
from ._inputs.batch import Batch
from ._inputs.targets import Contrast, Dense, TopK
from ._transport.credentials import TLS
from .exceptions import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    MessageTooLarge,
    ModelChanged,
    NotFound,
    OutOfRange,
    PartialFailure,
    PermissionDenied,
    ResourceExhausted,
    ServerDied,
    SidelightError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
    UnreadableFile,
)
from .methods.baselines import Blurred
from .methods.gradient import GradCAM, Gradient, GuidedBackpropagation, LayerGradientXActivation
from .methods.method import Method
from .methods.path import ExpectedGradients, IntegratedGradients, SmoothGrad
from .methods.perturbation import RISE, Occlusion
from .results.attribution import Attribution
from .results.example import ExampleAttribution
from .results.gallery import gallery
from .results.replay import Difference, Replay, Replayed, replay
from .results.server_info import (
    CancellationStats,
    Limits,
    ModelInfo,
    Preprocessing,
    ServerInfo,
    SharedMemory,
    WarmupEntry,
)
from .results.types import Convergence, ExplainedTarget, Failure, Geometry, Prediction, Provenance, Timing

__version__ = "0.1.0"

__all__ = [
    "RISE",
    "TLS",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "Attribution",
    "Batch",
    "Blurred",
    "CancellationStats",
    "Cancelled",
    "Client",
    "Contrast",
    "Convergence",
    "DataLoss",
    "DeadlineExceeded",
    "Dense",
    "Difference",
    "ExampleAttribution",
    "ExpectedGradients",
    "ExplainedTarget",
    "FailedPrecondition",
    "Failure",
    "Geometry",
    "GradCAM",
    "Gradient",
    "GuidedBackpropagation",
    "IntegratedGradients",
    "Internal",
    "InvalidArgument",
    "LayerGradientXActivation",
    "Limits",
    "MessageTooLarge",
    "Method",
    "ModelChanged",
    "ModelInfo",
    "NotFound",
    "Occlusion",
    "OutOfRange",
    "PartialFailure",
    "PermissionDenied",
    "Prediction",
    "Preprocessing",
    "Provenance",
    "Replay",
    "Replayed",
    "ResourceExhausted",
    "ServerDied",
    "ServerInfo",
    "SharedMemory",
    "SidelightError",
    "SmoothGrad",
    "Timing",
    "TopK",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "UnreadableFile",
    "WarmupEntry",
    "aio",
    "connect",
    "gallery",
    "replay",
]
