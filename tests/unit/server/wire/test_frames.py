"""Frames: tensors that are cut out and joined in by hand equal what protobuf reads and writes."""

from collections.abc import Sequence

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server.errors import InvalidArgument
from sidelight_server.wire import codec
from sidelight_server.wire.codec import (
    Decode,
    Received,
    Unreadable,
    decode_request,
    decode_stream_request,
    encode_answer,
)
from sidelight_server.wire.tensors import encoded

from support.messages.attribution import attribute
from support.messages.strategies import REQUESTS, STREAM_REQUESTS, anything
from support.profiles import n_examples

DATA = bytes(range(256)) * 256  # 64 KiB
PATHS = {
    "unary": (decode_request, pb.AttributeRequest, (3, 1, 3)),
    "stream": (decode_stream_request, pb.AttributeStreamRequest, (1, 3, 1, 3)),
}


def tensor_in(message: Message) -> tensor_pb2.Tensor | None:
    """Return the images' tensor of a request of either kind, if it has one."""
    if isinstance(message, pb.AttributeStreamRequest):
        if message.WhichOneof("request") != "attribute":
            return None
        message = message.attribute
    return message.images.tensor if message.images.WhichOneof("source") == "tensor" else None


def whole(received: Received[Message]) -> Message:
    """Put the data back into the message that it was cut out of."""
    tensor = tensor_in(received.message)
    if received.data is not None and tensor is not None:
        assert not tensor.data
        tensor.data = bytes(received.data)
    return received.message


def assert_as_protobuf(raw: bytes, decode: Decode[Message], kind: type[Message]) -> None:
    decoded = decode(raw)
    try:
        expected = kind.FromString(raw)
    except DecodeError:
        assert isinstance(decoded, Unreadable)
        assert isinstance(decoded.error, InvalidArgument)
        assert decoded.n_bytes == len(raw)
        return
    assert isinstance(decoded, Received)
    assert decoded.n_bytes == len(raw)
    # Bytes, not messages: a NaN is not equal to itself.
    assert whole(decoded).SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@pytest.fixture(autouse=True, scope="module")
def _cut_all() -> object:
    """Treat small messages as large ones."""
    before, codec.LARGE_BYTES = codec.LARGE_BYTES, 0
    yield
    codec.LARGE_BYTES = before


@settings(max_examples=n_examples(300))
@given(request=STREAM_REQUESTS)
def test_any_message_of_a_stream_is_read_as_protobuf_reads_it(request: pb.AttributeStreamRequest) -> None:
    assert_as_protobuf(request.SerializeToString(), decode_stream_request, pb.AttributeStreamRequest)


@settings(max_examples=n_examples(300))
@given(request=REQUESTS)
def test_any_request_is_read_as_protobuf_reads_it(request: pb.AttributeRequest) -> None:
    assert_as_protobuf(request.SerializeToString(), decode_request, pb.AttributeRequest)


@settings(max_examples=n_examples(250))
@given(
    requests=st.lists(STREAM_REQUESTS, min_size=1, max_size=3),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4),
    end=st.integers(0, 10_000),
)
def test_any_bytes_are_read_as_protobuf_reads_them(
    requests: list[pb.AttributeStreamRequest], changes: list[tuple[int, int]], end: int
) -> None:
    """Messages one after another are merged; bytes are changed; the rest is cut off."""
    raw = bytearray(b"".join(each.SerializeToString() for each in requests))
    for place, byte in changes:
        if raw:
            raw[place % len(raw)] = byte
    assert_as_protobuf(bytes(raw[: end or None]), decode_stream_request, pb.AttributeStreamRequest)


def varint(value: int, *, n_bytes: int = 0) -> bytes:
    """Return a varint, padded to a number of bytes if one is given."""
    out = bytearray()
    while value > 0x7F or len(out) + 1 < n_bytes:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def nested(path: Sequence[int], content: bytes) -> bytes:
    for number in reversed(path):
        content = field(number, content)
    return content


def oddities(path: tuple[int, ...]) -> dict[str, bytes]:
    """Return messages as no library writes them, for a path to the data."""
    outer = path[:-1]
    shape, dtype = field(2, bytes([1, 2, 3])), b"\x08\x04"
    odd = {
        "plain": nested(outer, dtype + shape + field(3, DATA)),
        "data first": nested(outer, field(3, DATA) + shape + dtype),
        "data twice": nested(outer, field(3, b"other") + dtype + field(3, DATA)),
        "no data": nested(outer, dtype + shape),
        "empty data": nested(outer, dtype + field(3, b"") + shape),
        "a group beside": nested(outer, dtype + field(3, DATA) + b"\x3b\x3c"),
        "an unfinished group": nested(outer, dtype + field(3, DATA) + b"\x3b"),
        "unknown fields": nested(outer, b"\x79" + bytes(8) + field(99, b"x") + field(3, DATA) + b"\x7d" + bytes(4)),
        "data of another wire type": nested(outer, dtype + b"\x18\x07" + field(3, DATA)),
        "data of another wire type alone": nested(outer, dtype + b"\x18\x07"),
        "field 0": nested(outer, b"\x02\x00" + field(3, DATA)),
        "an unknown wire type": nested(outer, b"\x0f" + field(3, DATA)),
        "a long tag": nested(outer, varint(3 << 3 | 2, n_bytes=4) + varint(len(DATA)) + DATA),
        "a tag that is too long": nested(outer, varint(3 << 3 | 2, n_bytes=6) + varint(len(DATA)) + DATA),
        "a tag of more than 32 bits": nested(outer, b"\x9a\x80\x80\x80\x10" + varint(len(DATA)) + DATA),
        "a long length": nested(outer, b"\x1a" + varint(len(DATA), n_bytes=5) + DATA),
        "a length that is too long": nested(outer, b"\x1a" + varint(len(DATA), n_bytes=6) + DATA),
        "a length beyond the end": nested(outer, b"\x1a" + varint(len(DATA) + 1) + DATA),
        "a number that never ends": nested(outer, field(3, DATA) + b"\x08" + b"\xff" * 12),
        "many fields": nested(outer, dtype * 100 + field(3, DATA)),
        "text that is no UTF-8": nested(outer, field(3, DATA)) + nested(outer[:-2], field(2, b"\xff")),
        "cut short": nested(outer, field(3, DATA))[:-1],
        "a byte too many": nested(outer, field(3, DATA)) + b"\x08",
    }
    for depth in range(1, len(outer) + 1):
        twice = nested(outer[depth - 1 :], dtype + field(3, DATA)) + nested(outer[depth - 1 :], shape)
        odd[f"merged at depth {depth}"] = nested(outer[: depth - 1], twice)
    images = nested(path[-2:], DATA)
    for name, other in (("shared", field(2, b"")), ("encoded", field(3, field(1, b"picture")))):
        odd[f"{name} after the tensor"] = nested(path[:-2], images + other)
        odd[f"{name} before the tensor"] = nested(path[:-2], other + images)
    if len(path) == 4:
        odd["a cancel after the batch"] = nested(outer, field(3, DATA)) + field(2, field(1, b"x"))
        odd["a cancel before the batch"] = field(2, field(1, b"x")) + nested(outer, field(3, DATA))
    return odd


ODD = {
    f"{name}, {call}": (raw, decode, kind)
    for call, (decode, kind, path) in PATHS.items()
    for name, raw in oddities(path).items()
}


@pytest.mark.parametrize(("raw", "decode", "kind"), ODD.values(), ids=ODD)
def test_a_message_that_is_odd_is_read_as_protobuf_reads_it(
    raw: bytes, decode: Decode[Message], kind: type[Message]
) -> None:
    assert_as_protobuf(raw, decode, kind)


def test_the_data_is_a_view_on_the_message() -> None:
    raw = attribute("one", np.zeros((2, 64, 64, 3), np.uint8)).SerializeToString()
    received = decode_stream_request(raw)
    assert isinstance(received, Received)
    assert received.data is not None
    assert received.data.obj is raw
    assert len(received.data) == 2 * 64 * 64 * 3
    assert not received.message.attribute.images.tensor.data


DTYPES = [tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT16, tensor_pb2.DATA_TYPE_UINT8]


@settings(max_examples=n_examples(300))
@given(
    id_=st.text(max_size=200),
    result=anything(pb.Attribution.DESCRIPTOR),
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_an_answer_is_written_as_protobuf_writes_it(
    id_: str, result: pb.Attribution, shape: list[int], dtype: tensor_pb2.DataType.ValueType
) -> None:
    result.ClearField("maps")
    provenance = result.provenance.SerializeToString()
    maps = encoded(np.random.default_rng(0).random(shape, np.float32), dtype)
    rest = pb.Attribution()
    rest.CopyFrom(result)
    rest.ClearField("provenance")
    whole, bare = (encode_answer(id_, rest, provenance, maps, is_inline=is_inline) for is_inline in (True, False))

    result.provenance.SetInParent()
    result.maps.CopyFrom(maps.tensor())
    for kind in (pb.AttributeResponse, pb.AttributeStreamResponse):
        expected = kind(id=id_, result=result).SerializeToString(deterministic=True)
        assert kind.FromString(whole).SerializeToString(deterministic=True) == expected
        assert len(whole) == len(expected)
    result.maps.data = b""
    expected = pb.AttributeResponse(id=id_, result=result).SerializeToString(deterministic=True)
    assert pb.AttributeResponse.FromString(bare).SerializeToString(deterministic=True) == expected
