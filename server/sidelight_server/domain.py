"""The domain: requests and answers of the engine, independent of protobuf and gRPC.

Arrays are numpy's; N examples, C channels, height H and width W. Types that are built for every answer are not frozen
dataclasses, whose construction takes three times as long.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .errors import SidelightError
from .inputs.preprocessing import Geometry
from .methods import Method
from .methods.channels import Channels
from .methods.gradient import GRADIENT

Array = NDArray[np.generic]
Choice = int | str  # a class, by index or label

# Above this number of examples, work whose time grows with them runs in a worker thread: it takes about 10 µs per
# example and stage, which would block the event loop.
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
    """Explain one given class for each example."""

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
    """A region of a dense output, in pixels of the output."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Dense:
    """Explain a class of a dense model: the sum of its scores over a region, or over all pixels.

    Without a choice, each pixel's largest output is summed. For a model without dense output this is its prediction.
    """

    choice: Choice | None = None
    region: Region | None = None

    @property
    def needs_pixels(self) -> bool:
        """Whether it requires a model with dense output."""
        return self.choice is not None or self.region is not None


Target = Predicted | Choice | PerExample | TopK | Contrast | Dense


@dataclass(frozen=True, slots=True)
class ResolvedTarget:
    """The resolved target of one example: a class index, or None for the predicted class."""

    positive: int | None = None
    negative: int | None = None  # the class whose score is subtracted
    region: Region | None = None  # of a dense output; None: all pixels
    each_pixel: bool = False  # sum the largest output of each pixel, whatever its class


PREDICTED = ResolvedTarget()


@dataclass(frozen=True, slots=True)
class Files:
    """Encoded image files."""

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
    exact: bool = False  # maps in float64, if the model computes in float64
    plain_head: bool = False  # compute scores in the type of the outputs, bit for bit as plain torch.autograd
    served: tuple[Choice, ...] = ()  # the classes that the caller's model server predicted, one per example, if given

    @property
    def n_examples(self) -> int:
        return len(self.images.files) if isinstance(self.images, Files) else len(self.images)


@dataclass(frozen=True, slots=True)
class ExplainedTarget:
    """The class and the score that one map explains."""

    index: int
    score: float
    saturated: bool  # whether every gradient that the method took is numerically zero
    against: int | None = None
    negligible: bool = False  # whether the map is zero everywhere or rounding error only


@dataclass(frozen=True, slots=True)
class Convergence:
    """Error measures of a map from a method of several rows; None if the method has no such measure."""

    rows: int
    error: float | None
    completeness_error: float | None
    relative_completeness_error: float | None
    tolerance: float | None = None
    is_met: bool | None = None  # None without a tolerance


@dataclass(frozen=True, slots=True)
class Explanation:
    """The prediction and the explained classes of one example."""

    predicted: int
    probability: float
    targets: tuple[ExplainedTarget, ...]  # one, or k of them
    geometry: Geometry | None
    convergence: Convergence | None  # None for a method of one row


@dataclass(frozen=True, slots=True)
class ExampleFailure:
    """The failure of one example. `code` is a canonical status code."""

    example: int
    code: int
    message: str


class Timing(NamedTuple):
    """Time that one request spent in each stage, and the server's backlog at its answer, in seconds."""

    prepare_s: float
    queue_s: float
    compute_s: float
    total_s: float
    admission_s: float = 0.0
    backlog_s: float = 0.0
    rendering_s: float = 0.0  # for drawing pictures of the maps


class Provenance(NamedTuple):
    """Everything that is needed to reproduce an answer."""

    model: str
    model_version: int
    model_digest: str
    precision: str
    head_precision: str
    kernel_options: tuple[str, ...]
    fidelity: float | None  # rank correlation with exact maps, as measured at load; None: not measured
    device: str
    threads: int
    chunk_rows: int
    reproducible: bool
    baseline_digest: str  # of baselines given as an array
    software: tuple[tuple[str, str], ...]
    model_canary: str = ""


@dataclass(slots=True)
class Answer:
    """The maps of one batch: [N, H, W], or [N, C, H, W] without channel reduction; with k targets k follows N.

    The map of a failed example is NaN, and so are maps that are not computed yet if `final` is False.
    """

    request: Request
    maps: NDArray[np.float32 | np.float64]  # float64 if requested
    explanations: tuple[Explanation | None, ...]  # None if the example failed
    labels: tuple[str, ...]
    provenance: Provenance
    timing: Timing
    failures: tuple[ExampleFailure, ...] = ()
    probabilities: NDArray[np.float32] | None = field(default=None)  # [N, K]
    final: bool = True
    example_digests: tuple[str, ...] = ()  # of the examples as received; empty without gRPC
    rendered: tuple[tuple[bytes, ...], ...] = ()  # PNG images of each example's maps; empty unless requested

    @property
    def mismatches(self) -> tuple[bool | None, ...]:
        """Whether each example's prediction differs from the served class; None if that is unknown."""
        served = self.request.served or (None,) * len(self.explanations)
        return tuple(
            None if choice is None or explanation is None else not self._is(explanation.predicted, choice)
            for explanation, choice in zip(self.explanations, served, strict=True)
        )

    def failing(self, failures: Mapping[int, SidelightError]) -> "Answer":
        """Return a copy of the answer in which these examples have failed too."""
        if not failures:
            return self
        maps = self.maps.copy()
        maps[list(failures)] = np.nan
        added = (ExampleFailure(i, error.code, error.message) for i, error in failures.items())
        return replace(
            self,
            maps=maps,
            explanations=tuple(None if i in failures else each for i, each in enumerate(self.explanations)),
            failures=tuple(sorted((*self.failures, *added), key=lambda each: each.example)),
        )

    def _is(self, predicted: int, choice: Choice) -> bool:
        if isinstance(choice, int):
            return predicted == choice
        return predicted < len(self.labels) and self.labels[predicted] == choice
