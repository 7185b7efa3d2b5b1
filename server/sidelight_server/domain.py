"""The domain: requests and answers as the engine knows them, without protobuf and without gRPC.

Arrays are numpy's; N examples, C channels, height H and width W.
"""

import enum
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .inputs.preprocessing import Geometry
from .methods import Method
from .methods.channels import Channels
from .methods.gradient import GRADIENT

Array = NDArray[np.generic]
Choice = int | str  # a class, by its number or its label

# Of more examples than these, all that takes time for each of them runs in a worker thread: in Python it is some 10 µs
# an example and stage, and the event loop answers everybody.
MANY_EXAMPLES = 256


class Score(enum.Enum):
    """The number whose gradient is taken."""

    PROBABILITY = "probability"
    LOGIT = "logit"
    LOG_PROBABILITY = "log_probability"
    MARGIN = "margin"


@dataclass(frozen=True, slots=True)
class Predicted:
    """Explain each example's predicted class."""


@dataclass(frozen=True, slots=True)
class PerExample:
    """Explain a class of its own for each example."""

    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class TopK:
    """Explain the k most probable classes of each example."""

    k: int


@dataclass(frozen=True, slots=True)
class Contrast:
    """Explain the score of one class minus that of another."""

    positive: Choice
    negative: Choice


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a dense output, in its own pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Dense:
    """Explain a class of a model that answers for each pixel: the sum of its scores over a region, or over all.

    Without a choice it is each pixel's own largest output that counts. A model that answers for the whole picture has
    one pixel: that is its prediction.
    """

    choice: Choice | None = None
    region: Region | None = None

    @property
    def needs_pixels(self) -> bool:
        """Whether it means nothing to a model that answers for the whole picture."""
        return self.choice is not None or self.region is not None


Target = Predicted | Choice | PerExample | TopK | Contrast | Dense


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """What is explained of one example: a class, or where that is None the predicted one."""

    positive: int | None = None
    negative: int | None = None  # the class whose score is subtracted
    region: Region | None = None  # of a dense output; None: all of it
    each_pixel: bool = False  # the largest output of each pixel of a dense output, whatever the class


PREDICTED = ResolvedTarget()


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
    method: Method = GRADIENT
    score: Score = Score.PROBABILITY
    channels: Channels = Channels.MAX_ABS
    probabilities: bool = False
    exact: bool = False  # maps in float64, where the model computes in that
    plain_head: bool = False  # scores in the type of the outputs, to be bit for bit what torch's autograd gives
    served: tuple[Choice, ...] = ()  # the classes that the caller's model server gave, one for each example, if told

    @property
    def n_examples(self) -> int:
        """N."""
        return len(self.images.files) if isinstance(self.images, Files) else len(self.images)


@dataclass(frozen=True, slots=True)
class ExplainedTarget:
    """What one map explains."""

    index: int
    score: float
    saturated: bool  # the gradient of the score is numerically dead wherever the map's method took it
    against: int | None = None
    negligible: bool = False  # the map is zero everywhere, or no more than rounding makes of what it is the sum of


@dataclass(frozen=True, slots=True)
class Convergence:
    """How good the map of a method of many rows is; None where a method has no such measure."""

    rows: int
    error: float | None
    completeness_error: float | None
    relative_completeness_error: float | None
    tolerance: float | None = None
    is_met: bool | None = None  # None without a tolerance


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was predicted and explained for one example."""

    predicted: int
    probability: float
    targets: tuple[ExplainedTarget, ...]  # one, or k of them
    geometry: Geometry | None
    convergence: Convergence | None  # None for a method of one row


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
    admission_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Provenance:
    """All that is needed to compute an answer again."""

    model: str
    model_version: int
    model_digest: str
    precision: str
    head_precision: str
    kernel_options: tuple[str, ...]
    device: str
    threads: int
    chunk_rows: int
    reproducible: bool
    baseline_digest: str  # of baselines that were given as an array
    software: tuple[tuple[str, str], ...]
    model_canary: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """The maps of one batch: [N, H, W], or [N, C, H, W] without channel reduction; with k targets k follows N.

    A failed example's map is NaN, and so is, while `final` is not set, one that has not come so far.
    """

    request: Request
    maps: NDArray[np.float32 | np.float64]  # float64 where that was asked for
    explanations: tuple[Explanation | None, ...]  # None where the example failed
    labels: tuple[str, ...]
    provenance: Provenance
    timing: Timing
    failures: tuple[ExampleFailure, ...] = ()
    probabilities: NDArray[np.float32] | None = field(default=None)  # [N, K]
    final: bool = True
    example_digests: tuple[str, ...] = ()  # of the examples as they were received, where a face has them

    @property
    def differs(self) -> tuple[bool | None, ...]:
        """Whether each example's prediction is another class than was served; None where that is not known."""
        served = self.request.served or (None,) * len(self.explanations)
        return tuple(
            None if choice is None or explanation is None else not self._is(explanation.predicted, choice)
            for explanation, choice in zip(self.explanations, served, strict=True)
        )

    def _is(self, predicted: int, choice: Choice) -> bool:
        if isinstance(choice, int):
            return predicted == choice
        return predicted < len(self.labels) and self.labels[predicted] == choice
