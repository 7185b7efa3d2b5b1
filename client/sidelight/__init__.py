"""Which pixels decided each prediction: the client of a Sidelight server.

with sidelight.connect("unix:/run/sidelight.sock") as client:
    answer = client.attribute("cat.png")
    answer.overlay(0).save("why.png")

The names below are enough for most programs. `sidelight.exceptions` has every exception, `sidelight.results` the types
of answers and server information, `sidelight.methods` the base class of methods, `sidelight.aio` the asyncio client.
"""

from . import aio, exceptions, methods, results
from ._clients.aio import AsyncClient
from ._clients.client import Client, connect
from ._clients.recomputation import replay
from ._inputs.batch import Batch
from ._inputs.targets import Contrast, Dense, TopK
from ._transport.credentials import TLS
from .exceptions import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PartialFailure,
    ResourceExhausted,
    SidelightError,
    Unavailable,
)
from .methods.baselines import Blurred
from .methods.gradient import GradCAM, Gradient, GuidedBackpropagation, LayerGradientXActivation
from .methods.path import ExpectedGradients, IntegratedGradients, SmoothGrad
from .methods.perturbation import RISE, Occlusion
from .results.attribution import Attribution
from .results.gallery import gallery
from .results.plot import plot

__version__ = "0.1.0"

__all__ = [
    "RISE",
    "TLS",
    "AsyncClient",
    "Attribution",
    "Batch",
    "Blurred",
    "Client",
    "Contrast",
    "DeadlineExceeded",
    "Dense",
    "ExpectedGradients",
    "FailedPrecondition",
    "GradCAM",
    "Gradient",
    "GuidedBackpropagation",
    "IntegratedGradients",
    "InvalidArgument",
    "LayerGradientXActivation",
    "NotFound",
    "Occlusion",
    "PartialFailure",
    "ResourceExhausted",
    "SidelightError",
    "SmoothGrad",
    "TopK",
    "Unavailable",
    "aio",
    "connect",
    "exceptions",
    "gallery",
    "methods",
    "plot",
    "replay",
    "results",
]
