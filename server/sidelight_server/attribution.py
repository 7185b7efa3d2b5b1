"""The domain: what is asked, and what is answered. No wire and no network: the engine speaks these words alone.

Arrays are numpy's; N examples, C channels, height H and width W.
"""

import enum
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .models.preprocessing import Geometry

Array = NDArray[np.generic]
Choice = int | str  # a class, by its number or its label


class Score(enum.Enum):
    """The number whose gradient is taken."""

    PROBABILITY = "probability"
    LOGIT = "logit"
    LOG_PROBABILITY = "log_probability"


class Magnitude(enum.Enum):
    """What becomes of a value's sign when channels are reduced."""

    ABSOLUTE = "absolute"
    SIGNED = "signed"


class Channels(enum.Enum):
    """How the C channels of an attribution become one."""

    MAX_ABS = "max_abs"
    SUM = "sum"
    MEAN_ABS = "mean_abs"
    L2 = "l2"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Predicted:
    """Explain each example's predicted class."""


@dataclass(frozen=True, slots=True)
class PerExample:
    """Explain a class of its own for each example."""

    choices: tuple[Choice, ...]


Target = Predicted | Choice | PerExample


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient at the example itself (Simonyan, Vedaldi and Zisserman, 2013), or that times the input."""

    magnitude: Magnitude = Magnitude.ABSOLUTE
    times_input: bool = False


@dataclass(frozen=True, slots=True)
class Files:
    """Pictures as files, still to be decoded."""

    files: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One batch to explain.

    `images` are files, pixels (uint8 [N, H, W, C]) or the model's own input (floating [N, C, H, W]).
    """

    images: Files | Array
    model: str = ""  # empty means the default model
    target: Target = Predicted()
    method: Gradient = Gradient()
    score: Score = Score.PROBABILITY
    channels: Channels = Channels.MAX_ABS
    probabilities: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was predicted and explained for one example."""

    predicted: int
    probability: float
    explained: int
    score: float
    saturated: bool
    geometry: Geometry | None


@dataclass(frozen=True, slots=True)
class ExampleFailure:
    """Why one example has no map. `code` is a canonical status code."""

    example: int
    code: int
    message: str


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of one request went, in seconds."""

    prepare_s: float
    queue_s: float
    compute_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """All that is needed to compute an answer again."""

    model: str
    model_version: int
    model_digest: str
    precision: str
    device: str
    threads: int
    chunk_rows: int
    software: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The maps of one batch: [N, H, W], or [N, C, H, W] without channel reduction. A failed example's map is NaN."""

    request: Request
    maps: NDArray[np.float32]
    explanations: tuple[Explanation | None, ...]  # None where the example failed
    labels: tuple[str, ...]
    provenance: Provenance
    timing: Timing
    failures: tuple[ExampleFailure, ...] = ()
    probabilities: NDArray[np.float32] | None = field(default=None)  # [N, K]
