"""Which pixels decided each prediction: the client of a Sidelight server.

with sidelight.connect("unix:/run/sidelight.sock") as client:
    answer = client.attribute("cat.png")
    answer.overlay(0).save("why.png")
"""

from . import aio
from ._aio import AsyncClient
from ._attribution import Attribution
from ._baselines import Blurred
from ._client import Client, connect
from ._credentials import TLS
from ._errors import (
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
from ._gallery import Panel, gallery
from ._images import Served
from ._info import Limits, ModelInfo, Preprocessing, ServerInfo, SharedMemory, Stops, WarmupEntry
from ._masking import Occlusion, Rise
from ._methods import (
    ExpectedGradients,
    GradCam,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    LayerGradientTimesActivation,
    Method,
    SmoothGrad,
)
from ._replay import Difference, Replay, Replayed, replay
from ._targets import Contrast, Dense, TopK
from ._types import Convergence, Explained, Failure, Geometry, Prediction, Provenance, Timing

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "Attribution",
    "Blurred",
    "Cancelled",
    "Client",
    "Contrast",
    "Convergence",
    "DataLoss",
    "DeadlineExceeded",
    "Dense",
    "Difference",
    "ExpectedGradients",
    "Explained",
    "FailedPrecondition",
    "Failure",
    "Geometry",
    "GradCam",
    "Gradient",
    "GuidedBackpropagation",
    "IntegratedGradients",
    "Internal",
    "InvalidArgument",
    "LayerGradientTimesActivation",
    "Limits",
    "MessageTooLarge",
    "Method",
    "ModelChanged",
    "ModelInfo",
    "NotFound",
    "Occlusion",
    "OutOfRange",
    "Panel",
    "PartialFailure",
    "PermissionDenied",
    "Prediction",
    "Preprocessing",
    "Provenance",
    "Replay",
    "Replayed",
    "ResourceExhausted",
    "Rise",
    "Served",
    "ServerDied",
    "ServerInfo",
    "SharedMemory",
    "SidelightError",
    "SmoothGrad",
    "Stops",
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
