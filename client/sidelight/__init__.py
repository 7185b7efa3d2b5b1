"""Which pixels decided each prediction: the client of a Sidelight server.

with sidelight.connect("unix:/run/sidelight.sock") as client:
    answer = client.attribute("cat.png")
    answer.overlay(0).save("why.png")
"""

from ._attribution import Attribution
from ._client import Client, connect
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
    NotFound,
    OutOfRange,
    PartialFailure,
    PermissionDenied,
    ResourceExhausted,
    SidelightError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
)
from ._gallery import Panel, gallery
from ._methods import Gradient
from ._types import (
    Explained,
    Failure,
    Geometry,
    Limits,
    ModelInfo,
    Prediction,
    Provenance,
    ServerInfo,
    Timing,
)

__version__ = "0.1.0"

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Attribution",
    "Cancelled",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "Explained",
    "FailedPrecondition",
    "Failure",
    "Geometry",
    "Gradient",
    "Internal",
    "InvalidArgument",
    "Limits",
    "MessageTooLarge",
    "ModelInfo",
    "NotFound",
    "OutOfRange",
    "Panel",
    "PartialFailure",
    "PermissionDenied",
    "Prediction",
    "Provenance",
    "ResourceExhausted",
    "ServerInfo",
    "SidelightError",
    "Timing",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "connect",
    "gallery",
]
