"""The codec: decodes and encodes messages without copying their one large tensor more than once.

protobuf would copy the tensor several times in each direction; see `sidelight._transport.envelope`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import DecodeError, Message
from sidelight._transport.envelope import LARGE_BYTES, cut, field
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..errors import InvalidArgument, ResourceExhausted, SidelightError
from .tensors import Encoded

M = TypeVar("M", bound=Message)


@dataclass(slots=True)
class Received(Generic[M]):
    """A decoded message. `data` is its images' tensor data if the codec cut it out: a view on gRPC's bytes."""

    message: M
    n_bytes: int
    data: memoryview | None = None

    @property
    def held_bytes(self) -> int:
        """Bytes that it and what is parsed from it take: parsing copies its tensors unless `data` was cut out."""
        return self.n_bytes if self.data is not None else 2 * self.n_bytes


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that could not be decoded: the error to answer with, and the number of bytes received."""

    error: SidelightError
    n_bytes: int = 0


Decoded = Received[M] | Unreadable
Decode = Callable[[bytes], Decoded[M]]


def decoder(message: type[M], path: Sequence[int]) -> Decode[M]:
    """Return a deserializer that cuts out the field at `path` (field numbers) if the message is large.

    It returns `Unreadable` instead of raising: an exception in a deserializer would end the whole stream.
    """

    def decode(raw: bytes) -> Decoded[M]:
        try:
            if len(raw) >= LARGE_BYTES and (parts := cut(memoryview(raw), path)):
                return Received(message.FromString(b"".join(parts.rest)), len(raw), parts.data)
            return Received(message.FromString(raw), len(raw))
        except (DecodeError, MemoryError) as error:
            return Unreadable(unreadable(raw, error), len(raw))

    return decode


def unreadable(raw: bytes, error: DecodeError | MemoryError) -> SidelightError:
    """Return the error for bytes that cannot be decoded."""
    # protobuf raises a plain DecodeError for a lack of memory.
    if isinstance(error, MemoryError) or "alloc failed" in str(error):
        return ResourceExhausted(f"message: the server has no memory for its {len(raw)} bytes")
    return InvalidArgument(f"message: {len(raw)} bytes that cannot be decoded")


_TO_DATA = (
    pb.AttributeRequest.IMAGES_FIELD_NUMBER,
    tensor_pb2.Images.TENSOR_FIELD_NUMBER,
    tensor_pb2.Tensor.DATA_FIELD_NUMBER,
)
decode_request = decoder(pb.AttributeRequest, _TO_DATA)
decode_stream_request = decoder(
    pb.AttributeStreamRequest, (pb.AttributeStreamRequest.ATTRIBUTE_FIELD_NUMBER, *_TO_DATA)
)


def encode_answer(id_: str, result: pb.Attribution, provenance: bytes, maps: Encoded, *, is_inline: bool) -> bytes:
    """Return the serialized answer of a unary call or of a stream: both messages have the same fields.

    `result` has neither maps nor provenance. Maps that are not inline keep their type, shape and scales.
    """
    head = tensor_pb2.Tensor(dtype=maps.dtype, shape=maps.elements.shape, scales=maps.scales).SerializeToString()
    data = maps.data if is_inline else b""
    tensor = [head, *(field(tensor_pb2.Tensor.DATA_FIELD_NUMBER, [data]) if len(data) else ())]
    attribution = [
        *field(pb.Attribution.MAPS_FIELD_NUMBER, tensor),
        result.SerializeToString(),
        *field(pb.Attribution.PROVENANCE_FIELD_NUMBER, [provenance]),
    ]
    name = pb.AttributeResponse(id=id_).SerializeToString()
    return b"".join([name, *field(pb.AttributeResponse.RESULT_FIELD_NUMBER, attribution)])


def encode(response: Message | bytes) -> bytes:
    """Serialize a response, unless it is bytes already."""
    return response if isinstance(response, bytes) else response.SerializeToString()
