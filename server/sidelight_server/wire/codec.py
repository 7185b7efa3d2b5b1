"""The codec: a message's bytes, with the one large tensor cut out as a view or spliced in by one join.

protobuf would copy it several times each way; see `sidelight._transport.envelope`.
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


@dataclass(frozen=True, slots=True)
class Received(Generic[M]):
    """A message that came. `data` is that of its images' tensor, where that was cut out: a view on gRPC's bytes."""

    message: M
    n_bytes: int
    data: memoryview | None = None


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What there is instead of a message, and how many bytes came."""

    error: SidelightError
    n_bytes: int = 0


Decoded = Received[M] | Unreadable
Decode = Callable[[bytes], Decoded[M]]


def decoder(message: type[M], path: Sequence[int]) -> Decode[M]:
    """Return what decodes a message's bytes, the field that `path` leads to cut out if it is large.

    Bytes that are no message become the error that says so: gRPC's own way would end a whole stream.
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
    """Return what to tell the caller whose bytes became no message."""
    # protobuf has no exception of its own for a lack of memory.
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
    """Return the bytes of an answer, of a unary call or on a stream: both have the same fields.

    `result` is without its maps and its provenance. Maps that travel otherwise keep type, shape and scales.
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
    """Return the bytes of a response, which may be encoded already."""
    return response if isinstance(response, bytes) else response.SerializeToString()
