"""Metadata: describes the server and its models in the protocol's messages."""

from collections.abc import Iterator
from importlib import metadata

from ...engine.registry.entry import Entry, State
from ...telemetry.counters import Statistics
from ...wire.requests import MAX_EXAMPLES
from . import inference_pb2 as oip
from .outputs import OUTPUTS
from .requests import IMAGES

EXTENSIONS = ("model_configuration", "model_repository", "statistics", "sidelight")
SHARED_MEMORY = "system_shared_memory"
PLATFORM = "sidelight_pytorch"
ANY = -1  # a dimension of any size
NANOSECONDS = 1e9

_CONFIG_TYPES = {
    "BOOL": oip.TYPE_BOOL,
    "BYTES": oip.TYPE_STRING,
    "FP32": oip.TYPE_FP32,
    "FP64": oip.TYPE_FP64,
    "INT64": oip.TYPE_INT64,
    "UINT8": oip.TYPE_UINT8,
}
_STATES = {State.SERVING: "READY", State.LOADING: "LOADING"}

_TensorMetadata = oip.ModelMetadataResponse.TensorMetadata


def of_server(*, shared_memory: bool) -> oip.ServerMetadataResponse:
    """Return the server's metadata."""
    extensions = (*EXTENSIONS, SHARED_MEMORY) if shared_memory else EXTENSIONS
    return oip.ServerMetadataResponse(name="sidelight", version=metadata.version("sidelight"), extensions=extensions)


def of_model(entry: Entry) -> oip.ModelMetadataResponse:
    """Return a model's metadata. Types and shapes are those of a request without parameters."""
    return oip.ModelMetadataResponse(
        name=entry.name,
        versions=[str(model.version) for model in entry.models[:1]],
        platform=PLATFORM,
        inputs=[_images(entry)],
        outputs=_outputs(entry),
    )


def config_of(entry: Entry) -> oip.ModelConfig:
    """Return a model's metadata as Triton's configuration: without the batch dimension, where there is one."""
    images = _images(entry)
    return oip.ModelConfig(
        name=entry.name,
        platform=PLATFORM,
        backend="sidelight",
        max_batch_size=MAX_EXAMPLES,
        input=[
            oip.ModelConfig.ModelInput(
                name=images.name, data_type=_CONFIG_TYPES[images.datatype], dims=images.shape[1:]
            )
        ],
        output=[
            oip.ModelConfig.ModelOutput(
                name=each.name, data_type=_CONFIG_TYPES[each.datatype], dims=each.shape[1:] or [1]
            )
            for each in _outputs(entry)
        ],
    )


def index_of(entry: Entry) -> oip.RepositoryIndexResponse.ModelIndex:
    """Return a model's entry in the index."""
    return oip.RepositoryIndexResponse.ModelIndex(
        name=entry.name,
        version=str(entry.models[0].version) if entry.models else "",
        state=_STATES.get(entry.state, "UNAVAILABLE"),
        reason="" if entry.models else entry.state.value,
    )


def statistics_of(entry: Entry, counted: Statistics) -> oip.ModelStatistics:
    """Return a model's statistics. The times of failed requests and of encoding are not measured: they are 0."""
    admission, queue = counted.seconds["admission"], counted.seconds["queue"]
    return oip.ModelStatistics(
        name=entry.name,
        version=str(entry.models[0].version) if entry.models else "",
        last_inference=round(counted.last_answer_s * 1000),
        inference_count=counted.n_examples,
        execution_count=queue[0],
        inference_stats=oip.InferStatistics(
            success=_duration(counted.seconds["total"]),
            fail=oip.StatisticDuration(count=counted.n_failed),
            queue=_duration((queue[0], admission[1] + queue[1])),
            compute_input=_duration(counted.seconds["prepare"]),
            compute_infer=_duration(counted.seconds["compute"]),
            compute_output=oip.StatisticDuration(count=queue[0]),
        ),
    )


def _duration(counted: tuple[int, float]) -> oip.StatisticDuration:
    count, seconds = counted
    return oip.StatisticDuration(count=count, ns=round(seconds * NANOSECONDS))


def _images(entry: Entry) -> oip.ModelMetadataResponse.TensorMetadata:
    """Return the input: pixels of any size if the model has preprocessing, otherwise its own input."""
    preprocessing = entry.models[0].preprocessing if entry.models else None
    if preprocessing:
        return _TensorMetadata(name=IMAGES, datatype="UINT8", shape=[ANY, ANY, ANY, preprocessing.channels])
    return _TensorMetadata(name=IMAGES, datatype="FP32", shape=[ANY, ANY, ANY, ANY])


def _outputs(entry: Entry) -> Iterator[oip.ModelMetadataResponse.TensorMetadata]:
    n_classes = (entry.models[0].class_count if entry.models else 0) or ANY
    for name, output in OUTPUTS.items():
        sizes = [n_classes if size == "K" else size if isinstance(size, int) else ANY for size in output.shape]
        yield _TensorMetadata(name=name, datatype=output.datatype, shape=sizes)
