"""The wire, inwards: messages become requests. Everything that a caller sends is checked here, by hand."""

import math
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

import numpy as np
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from .attribution import (
    Array,
    Channels,
    Choice,
    Files,
    Gradient,
    Magnitude,
    PerExample,
    Predicted,
    Request,
    Score,
    Target,
)
from .errors import InvalidArgument, Unimplemented

MAX_ID_BYTES = 128
MAX_ELEMENTS = 2**40  # far beyond any message, and below what numpy refuses as the shape of even an empty array
SERVED_METHODS = ("gradient",)

DTYPES: dict[tensor_pb2.DataType.ValueType, np.dtype[np.generic]] = {
    tensor_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    tensor_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2"),  # numpy has no such type: widened once it is read
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
SCORES: dict[model_pb2.Score.ValueType, Score] = {
    model_pb2.SCORE_PROBABILITY: Score.PROBABILITY,
    model_pb2.SCORE_LOGIT: Score.LOGIT,
    model_pb2.SCORE_LOG_PROBABILITY: Score.LOG_PROBABILITY,
}
CHANNELS: dict[pb.ChannelReduction.ValueType, Channels] = {
    pb.CHANNEL_REDUCTION_MAX_ABS: Channels.MAX_ABS,
    pb.CHANNEL_REDUCTION_SUM: Channels.SUM,
    pb.CHANNEL_REDUCTION_MEAN_ABS: Channels.MEAN_ABS,
    pb.CHANNEL_REDUCTION_L2: Channels.L2,
    pb.CHANNEL_REDUCTION_NONE: Channels.NONE,
}
MAGNITUDES: dict[pb.Magnitude.ValueType, Magnitude] = {
    pb.MAGNITUDE_ABSOLUTE: Magnitude.ABSOLUTE,
    pb.MAGNITUDE_SIGNED: Magnitude.SIGNED,
}

_Value = TypeVar("_Value")
_Number = TypeVar("_Number", bound=int)


class _Enum(Protocol[_Number]):
    """A generated enum."""

    def Name(self, number: _Number) -> str: ...  # noqa: N802
    def values(self) -> list[_Number]: ...


def parse(message: pb.AttributeRequest) -> Request:
    """Return the request that a message makes. `InvalidArgument` or `Unimplemented` name the field."""
    if len(message.id.encode()) > MAX_ID_BYTES:
        raise InvalidArgument(f"id: {len(message.id.encode())} bytes, expected at most {MAX_ID_BYTES}")
    timeout_s(message)
    _refuse_unserved_output(message.output)
    return Request(
        images=_images(message.images),
        model=message.model,
        target=_target(message.target),
        method=_method(message.method),
        score=_enum(message.score, SCORES, "score", model_pb2.Score, unset=Score.PROBABILITY),
        channels=_enum(message.channels, CHANNELS, "channels", pb.ChannelReduction, unset=Channels.MAX_ABS),
        probabilities=message.output.probabilities,
    )


def timeout_s(message: pb.AttributeRequest) -> float | None:
    """Return how long a request may take from its arrival, in seconds; None is for ever."""
    if not message.HasField("timeout"):
        return None
    seconds = message.timeout.seconds + message.timeout.nanos / 1e9
    if seconds <= 0:
        raise InvalidArgument(f"timeout: {seconds} s, expected a positive time")
    return seconds


def _images(images: tensor_pb2.Images) -> Files | Array:
    match images.WhichOneof("source"):
        case "tensor":
            return _batch(_array(images.tensor))
        case "encoded":
            return Files(tuple(images.encoded.files))
        case "shared":
            raise Unimplemented("images: shared memory is not served by this version; send a tensor or encoded files")
        case _:
            raise InvalidArgument("images: none; expected a tensor or encoded files")


def _array(tensor: tensor_pb2.Tensor) -> Array:
    """Return a tensor's elements as a view on the message. Nothing is allocated before lengths agree."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidArgument(f"images.dtype: {_named(tensor.dtype, tensor_pb2.DataType, DTYPES)}")
    if len(tensor.shape) not in (3, 4):  # first of all: the product of a million dimensions takes minutes
        raise InvalidArgument(
            f"images.shape: {list(tensor.shape[:8])} has {len(tensor.shape)} dimensions, expected {_letters(dtype)}"
        )
    shape = list(tensor.shape)
    if any(size < 0 for size in shape):
        raise InvalidArgument(f"images.shape: {shape}, expected no negative dimension")
    if tensor.scale:
        raise InvalidArgument(f"images.scale: {tensor.scale}, expected it unset in a request")
    n_elements = math.prod(shape)
    expected = n_elements * dtype.itemsize
    if expected != len(tensor.data):
        kind = tensor_pb2.DataType.Name(tensor.dtype).removeprefix("DATA_TYPE_").lower()
        raise InvalidArgument(
            f"images: shape {shape} has {n_elements} elements, {kind} needs {expected} bytes, "
            f"data has {len(tensor.data)}"
        )
    if math.prod(max(1, size) for size in shape) > MAX_ELEMENTS:
        raise InvalidArgument(f"images.shape: {shape} is too large, even for no examples")
    array: Array = np.frombuffer(tensor.data, dtype).reshape(shape)
    if tensor.dtype == tensor_pb2.DATA_TYPE_BFLOAT16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array


def _batch(array: Array) -> Array:
    """Return [N, H, W, C] pixels or [N, C, H, W] floats, whose N alone may be 0."""
    batch = array if array.ndim == 4 else array[None]
    if 0 in batch.shape[1:]:
        raise InvalidArgument(
            f"images.shape: {list(array.shape)} has a dimension of 0; only N may be 0 in {_letters(array.dtype)}"
        )
    return batch


def _letters(dtype: np.dtype[np.generic]) -> str:
    return "[N, H, W, C] or [H, W, C] for uint8" if dtype == np.uint8 else "[N, C, H, W] or [C, H, W] for floats"


def _target(target: pb.Target) -> Target:
    match target.WhichOneof("target"):
        case "predicted":
            return Predicted()
        case "index":
            return target.index
        case "label":
            return target.label
        case "per_example":
            return PerExample(tuple(map(_choice, target.per_example.classes)))
        case None:
            raise InvalidArgument(
                "target: unset, or newer than this server; expected predicted, index, label or per_example"
            )
        case unserved:
            raise Unimplemented(f"target: {unserved} is not served by this version")


def _choice(choice: pb.ClassChoice) -> Choice:
    match choice.WhichOneof("choice"):
        case "index":
            return choice.index
        case "label":
            return choice.label
        case _:
            raise InvalidArgument("target: a class choice is unset, expected index or label")


def _method(method: pb.Method) -> Gradient:
    match method.WhichOneof("method"):
        case "gradient":
            chosen = method.gradient
            return Gradient(
                magnitude=_enum(
                    chosen.magnitude, MAGNITUDES, "method.gradient.magnitude", pb.Magnitude, unset=Magnitude.ABSOLUTE
                ),
                times_input=chosen.times_input,
            )
        case None:
            raise InvalidArgument(f"method: unset, or newer than this server; it serves {', '.join(SERVED_METHODS)}")
        case unserved:
            raise Unimplemented(
                f"method: {unserved} is not served by this version; it serves {', '.join(SERVED_METHODS)}"
            )


def _enum(
    number: _Number, served: Mapping[_Number, _Value], field: str, enum: _Enum[_Number], *, unset: _Value
) -> _Value:
    """Return what a number stands for. Proto3 lets any number through, so unknown ones are refused here."""
    if number == 0:
        return unset
    if number in served:
        return served[number]
    error = Unimplemented if number in enum.values() else InvalidArgument
    raise error(f"{field}: {_named(number, enum, served)}")


def _named(number: _Number, enum: _Enum[_Number], served: Iterable[_Number]) -> str:
    got = (
        f"{enum.Name(number)} is not served by this version" if number in enum.values() else f"unknown number {number}"
    )
    return f"{got}; expected one of {', '.join(enum.Name(each) for each in served)}"


def _refuse_unserved_output(output: pb.Output) -> None:
    if output.map_dtype not in (tensor_pb2.DATA_TYPE_UNSPECIFIED, tensor_pb2.DATA_TYPE_FLOAT32):
        served = [tensor_pb2.DATA_TYPE_FLOAT32]
        error = Unimplemented if output.map_dtype in tensor_pb2.DataType.values() else InvalidArgument
        raise error(f"output.map_dtype: {_named(output.map_dtype, tensor_pb2.DataType, served)}")
    if output.rendered:
        raise Unimplemented("output.rendered: pictures of maps are not served by this version")
    if output.HasField("region"):
        raise Unimplemented("output.region: shared memory is not served by this version")
