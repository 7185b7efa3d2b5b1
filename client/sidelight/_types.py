"""What a server tells: about itself, its models, and each example of an answer."""

from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from ._methods import channels_name, score_name


@dataclass(frozen=True, slots=True)
class Prediction:
    """The class with the largest output."""

    index: int
    label: str  # empty where the model has no labels
    probability: float


@dataclass(frozen=True, slots=True)
class Explained:
    """The class that a map explains, and the score that was differentiated."""

    index: int
    label: str  # empty where the model has no labels
    score: float
    saturated: bool  # the score is a probability so near to 0 or 1 that its gradient is numerically dead


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one example of a batch has no map. `code` is a canonical gRPC status code."""

    example: int
    code: int
    message: str


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a picture became the model's input: resized to the scaled size, then the crop was cut out. In pixels."""

    original_height: int
    original_width: int
    scaled_height: int
    scaled_width: int
    crop_top: int
    crop_left: int
    crop_height: int
    crop_width: int

    @classmethod
    def of(cls, message: tensor_pb2.Geometry) -> "Geometry":
        """Return what a message says."""
        crop = message.crop
        return cls(
            message.original_height, message.original_width, message.scaled_height, message.scaled_width,
            crop.top, crop.left, crop.height, crop.width,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the server's time went for one batch, in seconds."""

    prepare_s: float  # decoding and resizing
    queue_s: float  # waiting for the device
    compute_s: float  # from the first row's start to the last row's end
    total_s: float  # from arrival to answer

    @classmethod
    def of(cls, message: pb.Timing) -> "Timing":
        """Return what a message says."""
        return cls(*map(_seconds, (message.prepare, message.queue, message.compute, message.total)))


@dataclass(frozen=True, slots=True)
class Provenance:
    """All that is needed to compute an answer again."""

    model: str
    model_version: int
    model_digest: str
    method: str  # with every default filled in, as text
    target: str
    score: str
    channels: str
    precision: str
    device: str
    threads: int
    chunk_rows: int
    software: dict[str, str]

    @classmethod
    def of(cls, message: pb.Provenance) -> "Provenance":
        """Return what a message says."""
        return cls(
            model=message.model,
            model_version=message.model_version,
            model_digest=message.model_digest,
            method=_method_text(message.method),
            target=_target_text(message.target),
            score=score_name(message.score),
            channels=channels_name(message.channels),
            precision=message.precision,
            device=message.device,
            threads=message.threads,
            chunk_rows=message.chunk_rows,
            software={each.name: each.version for each in message.software},
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller must stay within."""

    max_message_bytes: int
    max_image_pixels: int
    max_in_flight: int
    max_in_flight_bytes: int
    max_stream_in_flight: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model of a server."""

    name: str
    version: int
    digest: str
    input_size: tuple[int, int, int] | None  # C, H, W; None where it is not fixed
    class_count: int  # 0 until the first request of a model without a fixed input size
    labels: tuple[str, ...]
    scores: tuple[str, ...]
    layers: tuple[str, ...]
    precision: str
    device: str
    chunk_rows: int

    @classmethod
    def of(cls, message: model_pb2.ModelInfo) -> "ModelInfo":
        """Return what a message says."""
        size = message.input
        return cls(
            name=message.name,
            version=message.version,
            digest=message.digest,
            input_size=(size.channels, size.height, size.width) if message.HasField("input") else None,
            class_count=message.class_count,
            labels=tuple(message.labels),
            scores=tuple(map(score_name, message.scores)),
            layers=tuple(message.layers),
            precision=message.precision,
            device=message.device,
            chunk_rows=message.chunk_rows,
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server: its version, limits, methods and models. The first model is the default."""

    version: str
    limits: Limits
    methods: tuple[str, ...]
    models: tuple[ModelInfo, ...]

    @classmethod
    def of(cls, message: pb.GetServerInfoResponse) -> "ServerInfo":
        """Return what a message says."""
        limits = message.limits
        return cls(
            version=message.version,
            limits=Limits(
                limits.max_message_bytes, limits.max_image_pixels, limits.max_in_flight, limits.max_in_flight_bytes,
                limits.max_stream_in_flight,
            ),
            methods=tuple(message.methods),
            models=tuple(map(ModelInfo.of, message.models)),
        )  # fmt: skip


def _seconds(span: Duration) -> float:
    return float(span.seconds + span.nanos / 1e9)


def _method_text(method: pb.Method) -> str:
    name = method.WhichOneof("method") or ""
    if name != "gradient":
        return name
    magnitude = pb.Magnitude.Name(method.gradient.magnitude).removeprefix("MAGNITUDE_").lower()
    return f"gradient(magnitude={magnitude}, times_input={method.gradient.times_input})"


def _target_text(target: pb.Target) -> str:
    match target.WhichOneof("target"):
        case "index":
            return f"index {target.index}"
        case "label":
            return f'label "{target.label}"'
        case "per_example":
            return "per example: " + _choices_text(target.per_example.classes)
        case other:
            return other or ""


def _choices_text(choices: Sequence[pb.ClassChoice]) -> str:
    return ", ".join(f'"{each.label}"' if each.WhichOneof("choice") == "label" else str(each.index) for each in choices)
