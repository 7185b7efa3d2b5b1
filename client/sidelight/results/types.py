"""The parts of an answer: predictions, targets, timing, convergence and provenance."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from .._inputs.enums import word
from .._inputs.targets import target_text
from ..methods.parsing import method_text

SATURATED = (
    "the score is saturated: its gradient vanishes numerically, and the map is mostly rounding error. "
    'Use score="logit"; if the model returns probabilities, serve its logits instead'
)

NEGLIGIBLE = (
    "the map is zero everywhere, or only rounding error: the score does not depend on what this method varies. "
    "Use another layer, method or target"
)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The class with the largest output."""

    index: int
    label: str  # empty if the model has no labels
    probability: float
    is_mismatch: bool | None = None  # whether it differs from the given served class; None without one

    @classmethod
    def of(cls, message: pb.Example) -> "Prediction":
        is_mismatch = message.is_mismatch if message.HasField("is_mismatch") else None
        predicted = message.prediction
        return cls(predicted.index, predicted.label, predicted.probability, is_mismatch)


@dataclass(frozen=True, slots=True)
class ExplainedTarget:
    """The class that a map explains, and the score that was differentiated."""

    index: int
    label: str  # empty if the model has no labels
    score: float
    saturated: bool  # the gradient vanishes numerically wherever it was taken: the map is rounding error
    against: int | None = None  # the other class of a contrast
    negligible: bool = False  # the map is zero everywhere, or only rounding error

    @classmethod
    def of(cls, message: pb.ExplainedTarget) -> "ExplainedTarget":
        against = message.against if message.HasField("against") else None
        return cls(message.index, message.label, message.score, message.saturated, against, message.negligible)

    @property
    def advice(self) -> str:
        """What to change if the map is `saturated` or `negligible`; else empty."""
        return SATURATED if self.saturated else NEGLIGIBLE if self.negligible else ""


@dataclass(frozen=True, slots=True)
class Convergence:
    """Error estimates of a map of many rows; a field is None if the method has none. With top-k, of the worst map."""

    rows: int  # that ran, including those without a gradient
    error: float | None  # estimate compared with the tolerance: a share of the map's L2 norm
    completeness_error: float | None  # |sum of the map − (score of the example − score of the baseline)|
    relative_completeness_error: float | None  # completeness_error / |score of the example − score of the baseline|
    tolerance: float | None = None  # of the method; None if it has none
    is_met: bool | None = None  # whether the tolerance was met before `max_rows`; with top-k, for every map

    @classmethod
    def of(cls, message: pb.Convergence) -> "Convergence":
        return cls(**same_fields(cls, message))


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one example of a batch has no map. `code` is a canonical gRPC status code."""

    example: int
    code: int
    message: str


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a picture became the model's input: resized to the scaled size, then cropped. In pixels.

    `window` has the values that became black and white, for 16-bit and DICOM files; None is the file's own window.
    """

    original_height: int
    original_width: int
    scaled_height: int
    scaled_width: int
    crop_top: int
    crop_left: int
    crop_height: int
    crop_width: int
    window: tuple[float, float] | None = None

    @classmethod
    def of(cls, message: tensor_pb2.Geometry) -> "Geometry":
        crop = message.crop
        return cls(
            message.original_height, message.original_width, message.scaled_height, message.scaled_width,
            crop.top, crop.left, crop.height, crop.width,
            (message.window.low, message.window.high) if message.HasField("window") else None,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timing:
    """The server's time for one batch, by stage, and its backlog, in seconds."""

    prepare_s: float  # decoding and resizing
    queue_s: float  # waiting for the device
    compute_s: float  # from the first row's start to the last row's end
    total_s: float  # from arrival to answer
    admission_s: float = 0.0  # from arrival to admission: waiting for the model, a slot and permits
    backlog_s: float = 0.0  # the work of all callers that waited or ran on the server when it answered

    @classmethod
    def of(cls, message: pb.Timing) -> "Timing":
        spans = message.prepare, message.queue, message.compute, message.total, message.admission, message.backlog
        return cls(*map(seconds, spans))


@dataclass(frozen=True, slots=True)
class Provenance:
    """Everything that is needed to recompute an answer, except the images."""

    model: str
    model_version: int
    model_digest: str
    method: str  # as text, with all defaults
    target: str
    score: str
    channels: str
    precision: str
    device: str
    threads: int
    chunk_rows: int
    software: dict[str, str]
    reproducible: bool  # whether equal provenance guarantees equal bytes
    baseline_digest: str  # SHA-256 of a baseline array, else empty
    kernel_options: tuple[str, ...] = ()  # optimizations chosen by the operator: "fold", "channels_last", "compile"
    example_digests: tuple[str, ...] = ()  # SHA-256 of each example as the server received it
    model_canary: str = ""  # digest of the model's output for a fixed input; empty if unknown
    fidelity: float | None = None  # rank correlation with exact maps, measured at load on random inputs
    head_precision: str = ""  # of the score and its gradient at the model's output; empty from an older server

    @classmethod
    def of(cls, message: pb.Provenance) -> "Provenance":
        return cls(
            **same_fields(cls, message),
            method=method_text(message.method),
            target=target_text(message.target),
            score=word(model_pb2.Score, message.score),
            channels=word(pb.ChannelReduction, message.channels),
            software={each.name: each.version for each in message.software},
        )


def same_fields(kind: Any, message: Message) -> dict[str, Any]:
    """Return the fields of a dataclass that a message has by the same names: None if unset, tuples if repeated.

    Messages and enums are left out: the caller converts them.
    """
    return {each.name: _value(message, each) for each in _same_fields(kind, message.DESCRIPTOR)}


@functools.cache
def _same_fields(kind: Any, descriptor: Descriptor) -> tuple[FieldDescriptor, ...]:
    names = {each.name for each in dataclasses.fields(kind)}
    plain = [each for each in descriptor.fields if each.message_type is None and each.enum_type is None]
    return tuple(each for each in plain if each.name in names)


def _value(message: Message, field: FieldDescriptor) -> Any:
    if field.has_presence and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
    return tuple(value) if field.is_repeated else value


def seconds(span: Duration) -> float:
    """Convert a `Duration` to seconds."""
    return float(span.seconds + span.nanos / 1e9)
