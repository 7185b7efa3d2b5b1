"""Server information: limits, models and their preprocessing."""

from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from .._inputs.enums import word
from .types import same_fields, seconds


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
        return cls(**same_fields(cls, message))


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
        window = _ends(message.window) if message.HasField("window") else None
        pixel_range = _ends(message.pixel_range) if message.HasField("pixel_range") else (0.0, 1.0)
        return cls(**same_fields(cls, message), pixel_range=pixel_range, window=window)


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
        fields = same_fields(cls, message) | ({} if is_whole else {"labels": None, "layers": None})
        return cls(
            **fields,
            input_size=(size.channels, size.height, size.width) if message.HasField("input") else None,
            preprocessing=Preprocessing.of(size) if message.HasField("input") else None,
            scores=tuple(word(model_pb2.Score, each) for each in message.scores),
            warmup=tuple(map(WarmupEntry.of, message.warmup)),
            state=word(model_pb2.ModelState, message.state),
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
        limits, shared = message.limits, message.shared_memory
        has_shared = message.HasField("shared_memory")
        shared_memory = SharedMemory(**same_fields(SharedMemory, shared)) if has_shared else None
        max_age_s = seconds(limits.max_stream_age) if limits.HasField("max_stream_age") else None
        return cls(
            version=message.version,
            limits=Limits(**same_fields(Limits, limits), max_stream_age_s=max_age_s),
            methods=tuple(message.methods),
            models=tuple(map(ModelInfo.of, message.models)),
            cancellations=CancellationStats.of(message.cancellations),
            shared_memory=shared_memory,
        )


def _ends(message: tensor_pb2.Interval) -> tuple[float, float]:
    return message.low, message.high
