"""Requests: validates request messages and converts them to domain requests."""

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from ..domain import (
    MANY_EXAMPLES,
    Array,
    Choice,
    Contrast,
    Dense,
    Files,
    PerExample,
    Predicted,
    Region,
    Request,
    Score,
    Target,
    TopK,
)
from ..errors import InvalidArgument, Unimplemented
from ..methods.channels import Channels
from .enums import meaning, named, numbers
from .methods import parse_method
from .tensors import MAP_DTYPES, array_of, layout_of, letters

MAX_ID_BYTES = 128
MAX_EXAMPLES = 4096  # each costs time and memory, however few bytes it has
SCORES = numbers(model_pb2.Score, Score)
CHANNELS = numbers(pb.ChannelReduction, Channels)


def parse(message: pb.AttributeRequest, data: memoryview | None = None) -> Request:
    """Validate a message and return it as a request. Raises `InvalidArgument` or `Unimplemented`, naming the field.

    `data` is the images' tensor data if the codec cut it out of the message. Images in shared memory are not read yet:
    a placeholder array of their shape and type, which takes no memory, stands in for them.
    """
    if len(message.id.encode()) > MAX_ID_BYTES:
        raise InvalidArgument(f"id: {len(message.id.encode())} bytes, expected at most {MAX_ID_BYTES}")
    timeout_s(message)
    images = _images(message.images, data)
    n_examples = len(images.files) if isinstance(images, Files) else len(images)
    request = Request(
        images=images,
        model=message.model,
        target=_target(message.target, n_examples),
        method=parse_method(message.method),
        score=meaning(message.score, SCORES, "score", model_pb2.Score, unset=Score.PROBABILITY),
        channels=meaning(message.channels, CHANNELS, "channels", pb.ChannelReduction, unset=Channels.MAX_ABS),
        probabilities=message.output.probabilities,
        served=_served(message.served_classes, n_examples) if message.HasField("served_classes") else (),
    )
    _check_output(message.output, request)
    return request


def takes_long(message: pb.AttributeRequest) -> bool:
    """Whether a message has so many files or classes that `parse` should not run on the event loop."""
    counts = (
        len(message.images.encoded.files),
        len(message.target.per_example.classes),
        len(message.served_classes.classes),
    )
    return max(counts) > MANY_EXAMPLES


def timeout_s(message: pb.AttributeRequest) -> float | None:
    """Return the request's timeout in seconds from its arrival; None: no timeout. Raises `InvalidArgument`."""
    if not message.HasField("timeout"):
        return None
    seconds = message.timeout.seconds + message.timeout.nanos / 1e9
    if seconds <= 0:
        raise InvalidArgument(f"timeout: {seconds} s, expected a positive time")
    return seconds


def _images(images: tensor_pb2.Images, data: memoryview | None) -> Files | Array:
    match images.WhichOneof("source"):
        case "tensor":
            return _batch(array_of(images.tensor, field="images", data=data))
        case "encoded":
            _check_count(len(images.encoded.files))
            return Files(tuple(images.encoded.files))
        case "shared":
            return _batch(layout_of(images.shared, field="images").placeholder())
        case _:
            raise InvalidArgument("images: none; expected a tensor, shared or encoded files")


def _check_count(n_examples: int) -> None:
    if n_examples > MAX_EXAMPLES:
        raise InvalidArgument(f"images: {n_examples} examples, expected at most {MAX_EXAMPLES} in a batch")


def _batch(array: Array) -> Array:
    """Return [N, H, W, C] pixels or [N, C, H, W] floats. Raises `InvalidArgument` if another dimension than N is 0."""
    batch = array if array.ndim == 4 else array[None]
    _check_count(len(batch))
    if 0 in batch.shape[1:]:
        raise InvalidArgument(
            f"images.shape: {list(array.shape)} has a dimension of 0; only N may be 0 in {letters(array.dtype)}"
        )
    return batch


def _check_each(n: int, n_examples: int, *, field: str) -> None:
    """Raise `InvalidArgument` unless there is a class for each example. Called before any of them is parsed."""
    if n != n_examples:
        raise InvalidArgument(f"{field}: {n} classes for {n_examples} examples, expected one for each")


def _target(target: pb.Target, n_examples: int) -> Target:
    match target.WhichOneof("target"):
        case "predicted":
            return Predicted()
        case "index":
            return target.index
        case "label":
            return target.label
        case "per_example":
            _check_each(len(target.per_example.classes), n_examples, field="target")
            return PerExample(tuple(map(_choice, target.per_example.classes)))
        case "top_k":
            if target.top_k.k < 1:
                raise InvalidArgument(f"target.top_k.k: got {target.top_k.k}, expected at least 1")
            return TopK(target.top_k.k)
        case "contrast":
            return Contrast(_choice(target.contrast.positive), _choice(target.contrast.negative))
        case "dense":
            region = _region(target.dense.region) if target.dense.HasField("region") else None
            return Dense(_choice(target.dense.choice) if target.dense.HasField("choice") else None, region)
        case _:
            known = ", ".join(field.name for field in pb.Target.DESCRIPTOR.oneofs[0].fields)
            raise InvalidArgument(f"target: unset, or newer than this server; expected one of {known}")


def _region(box: tensor_pb2.Box) -> Region:
    if box.top < 0 or box.left < 0 or box.height < 1 or box.width < 1:
        raise InvalidArgument(
            f"target.dense.region: top {box.top}, left {box.left}, height {box.height}, width {box.width}; "
            "expected none negative, and a height and a width of at least 1"
        )
    return Region(box.top, box.left, box.height, box.width)


def _choice(choice: pb.ClassChoice, *, field: str = "target") -> Choice:
    match choice.WhichOneof("choice"):
        case "index":
            return choice.index
        case "label":
            return choice.label
        case _:
            raise InvalidArgument(f"{field}: a class choice is unset, expected index or label")


def _served(served: pb.ServedPredictions, n_examples: int) -> tuple[Choice, ...]:
    _check_each(len(served.classes), n_examples, field="served_classes")
    return tuple(_choice(each, field="served_classes") for each in served.classes)


def _check_output(output: pb.Output, request: Request) -> None:
    dtype = output.map_dtype
    if dtype and dtype not in MAP_DTYPES:
        error = Unimplemented if dtype in tensor_pb2.DataType.values() else InvalidArgument
        raise error(f"output.map_dtype: {named(dtype, tensor_pb2.DataType, MAP_DTYPES)}")
    if dtype == tensor_pb2.DATA_TYPE_UINT8 and request.method.may_be_negative(request.channels):
        raise InvalidArgument(
            f"output.map_dtype: UINT8 has no sign, and a map of {request.method.name} with channels "
            f"{request.channels.value} may be negative; use FLOAT16, or another reduction"
        )
    if output.region.dtype or output.region.shape:
        raise InvalidArgument("output.region: dtype and shape are to be left unset; map_dtype and the model give them")
