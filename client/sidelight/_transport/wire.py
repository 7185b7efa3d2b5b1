"""Serialization of a stream's messages. protobuf copies neither large arrays nor large maps (see `envelope`)."""

from dataclasses import dataclass

import grpc
import numpy as np

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from .._inputs.tensors import DTYPES, Array, little_endian
from .envelope import LARGE_BYTES, cut, field

METHOD = "/sidelight.v1.AttributionService/AttributeStream"
_TO_MAPS = (
    pb.AttributeStreamResponse.RESULT_FIELD_NUMBER,
    pb.Attribution.MAPS_FIELD_NUMBER,
    tensor_pb2.Tensor.DATA_FIELD_NUMBER,
)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A request to send. `images` is the array that the message leaves out, if any."""

    message: pb.AttributeStreamRequest
    images: Array | None = None


@dataclass(frozen=True, slots=True)
class Incoming:
    """A received response. `maps` is a view of the bytes of its maps, if they were cut out of the message."""

    message: pb.AttributeStreamResponse
    maps: memoryview | None = None


def open_stream(channel: grpc.Channel) -> "grpc.StreamStreamMultiCallable[Outgoing, Incoming]":
    """Return the stub of `AttributeStream`, with this module's serialization."""
    return channel.stream_stream(METHOD, request_serializer=encode, response_deserializer=decode)


def is_large(array: Array) -> bool:
    """Return whether an array is large enough to leave it out of the message."""
    return bool(array.nbytes >= LARGE_BYTES)


def encode(outgoing: Outgoing) -> bytes:
    array = outgoing.images
    if array is None:
        return outgoing.message.SerializeToString()
    head = tensor_pb2.Tensor(dtype=DTYPES[array.dtype.name], shape=array.shape).SerializeToString()
    data = little_endian(array).reshape(-1).view(np.uint8).data
    tensor = [head, *field(tensor_pb2.Tensor.DATA_FIELD_NUMBER, [data])]
    images = field(tensor_pb2.Images.TENSOR_FIELD_NUMBER, tensor)
    request = [
        outgoing.message.attribute.SerializeToString(),
        *field(pb.AttributeRequest.IMAGES_FIELD_NUMBER, images),
    ]
    return b"".join(field(pb.AttributeStreamRequest.ATTRIBUTE_FIELD_NUMBER, request))


def decode(raw: bytes) -> Incoming:
    if len(raw) >= LARGE_BYTES and (parts := cut(memoryview(raw), _TO_MAPS)):
        return Incoming(pb.AttributeStreamResponse.FromString(b"".join(parts.rest)), parts.data)
    return Incoming(pb.AttributeStreamResponse.FromString(raw))
