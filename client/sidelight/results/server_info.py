"""Server information: limits, models and their preprocessing."""

from dataclasses import dataclass
from functools import partial

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from .._inputs.enums import word
from .types import seconds


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits for one caller."""

    max_message_bytes: int
    max_image_pixels: int
    max_in_flight: int
    max_in_flight_bytes: int
    max_stream_in_flight: int
    max_example_rows: int  # rows that a method may need for one example
    max_batch_examples: int = 0  # 0: unknown, from an older server
    max_stream_age_s: float | None = None  # None: unlimited. The client continues on a new stream
    max_rendered_pixels: int = 0  # of a picture that the server draws; 0: it draws none


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """The directory for shared-memory regions, and the limits for one stream."""

    directory: str
    max_region_bytes: int
    max_stream_regions: int


@dataclass(frozen=True, slots=True)
class CancellationStats:
    """Times from cancellation, or timeout, to the end of requests that had a row on the device."""

    count: int
    mean_s: float
    longest_s: float

    @classmethod
    def of(cls, message: pb.CancellationStats) -> "CancellationStats":
        return cls(message.count, seconds(message.mean), seconds(message.longest))


@dataclass(frozen=True, slots=True)
class WarmupEntry:
    """One measurement made while a model was loaded."""

    configuration: str
    rows: int  # the size of the chunk
    rows_per_second: float
    chosen: bool  # whether the server uses this configuration

    @classmethod
    def of(cls, message: model_pb2.WarmupEntry) -> "WarmupEntry":
        return cls(message.configuration, message.rows, message.rows_per_second, message.chosen)


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Preprocessing of pixels: resize, crop, scale to `pixel_range`, then normalize each channel by mean and std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str  # the short side in pixels, "256"; or height and width, "288x256"; or "exact", or "none"
    interpolation: str
    pixel_range: tuple[float, float] = (0.0, 1.0)
    window: tuple[float, float] | None = None  # black and white values of 16-bit and DICOM files; None: the file's own

    @classmethod
    def of(cls, message: model_pb2.InputInfo) -> "Preprocessing":
        return cls(
            tuple(message.mean),
            tuple(message.std),
            message.resize,
            message.interpolation,
            _ends(message.pixel_range) if message.HasField("pixel_range") else (0.0, 1.0),
            _ends(message.window) if message.HasField("window") else None,
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model of a server."""

    name: str
    version: int
    digest: str
    input_size: tuple[int, int, int] | None  # C, H, W; None if it is not fixed
    class_count: int  # 0 until the first request if the input size is not fixed
    labels: tuple[str, ...] | None  # None in ServerInfo.models: `client.model(name)` returns them
    scores: tuple[str, ...]
    layers: tuple[str, ...] | None  # None in ServerInfo.models, as for labels
    precision: str
    device: str
    chunk_rows: int
    reproducible: bool  # whether equal provenance guarantees equal bytes
    warmup: tuple[WarmupEntry, ...]  # empty if the input size is not fixed
    kernel_options: tuple[str, ...] = ()  # optimizations chosen by the operator: "fold", "channels_last", "compile"
    state: str = "serving"  # or "unloaded" (until its first request), "loading", "failed": other fields are empty
    call: str = ""  # how the model is called, and which part of its output is used
    outputs: str = ""  # kind of that output: "logits" or "probabilities"; empty until the first row has run
    activation: str = ""  # "softmax" if classes are mutually exclusive, else "sigmoid"
    preprocessing: Preprocessing | None = None  # None if the input size is not fixed
    canary: str = ""  # "3×224×224:" and the digest of the output for a fixed input of that size
    methods: tuple[str, ...] = ()  # that the model supports, by their names in the schema
    neighbor_difference: float | None = None  # change of a gradient by other rows of its chunk, relative to its maximum

    @classmethod
    def of(cls, message: model_pb2.ModelInfo, *, is_whole: bool = False) -> "ModelInfo":
        """Convert from the wire message. Labels and layers are read only if the message `is_whole`."""
        size = message.input
        return cls(
            name=message.name,
            version=message.version,
            digest=message.digest,
            input_size=(size.channels, size.height, size.width) if message.HasField("input") else None,
            class_count=message.class_count,
            labels=tuple(message.labels) if is_whole else None,
            scores=tuple(map(partial(word, model_pb2.Score), message.scores)),
            layers=tuple(message.layers) if is_whole else None,
            precision=message.precision,
            device=message.device,
            chunk_rows=message.chunk_rows,
            reproducible=message.reproducible,
            warmup=tuple(map(WarmupEntry.of, message.warmup)),
            kernel_options=tuple(message.kernel_options),
            preprocessing=Preprocessing.of(size) if message.HasField("input") else None,
            state=word(model_pb2.ModelState, message.state),
            call=message.call,
            outputs=message.outputs,
            activation=message.activation,
            canary=message.canary,
            methods=tuple(message.methods),
            neighbor_difference=message.neighbor_difference if message.HasField("neighbor_difference") else None,
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """A server: its version, limits, methods and models. The first model is the default."""

    version: str
    limits: Limits
    methods: tuple[str, ...]
    models: tuple[ModelInfo, ...]
    cancellations: CancellationStats
    shared_memory: SharedMemory | None = None  # None if the operator does not allow it

    @classmethod
    def of(cls, message: pb.GetServerInfoResponse) -> "ServerInfo":
        limits = message.limits
        return cls(
            version=message.version,
            limits=Limits(
                limits.max_message_bytes, limits.max_image_pixels, limits.max_in_flight, limits.max_in_flight_bytes,
                limits.max_stream_in_flight, limits.max_example_rows, limits.max_batch_examples,
                seconds(limits.max_stream_age) if limits.HasField("max_stream_age") else None,
                limits.max_rendered_pixels,
            ),
            methods=tuple(message.methods),
            models=tuple(map(ModelInfo.of, message.models)),
            cancellations=CancellationStats.of(message.cancellations),
            shared_memory=_shared_memory(message) if message.HasField("shared_memory") else None,
        )  # fmt: skip


def _ends(message: tensor_pb2.Interval) -> tuple[float, float]:
    return message.low, message.high


def _shared_memory(message: pb.GetServerInfoResponse) -> SharedMemory:
    shared = message.shared_memory
    return SharedMemory(shared.directory, shared.max_region_bytes, shared.max_stream_regions)
