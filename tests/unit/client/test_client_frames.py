"""The client's frames: bytes sent and messages read equal those of protobuf for the same messages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidelight._inputs.tensors import array_of, tensor_message
from sidelight._transport.envelope import LARGE_BYTES
from sidelight._transport.wire import Outgoing, decode, encode, is_large
from sidelight.v1 import attribution_pb2 as pb

DTYPES = st.sampled_from(["uint8", "float16", "float32", "float64"])
SHAPES = st.lists(st.integers(0, 9), min_size=4, max_size=4)


def message(id_: str, seed: int) -> pb.AttributeStreamRequest:
    request = pb.AttributeRequest(id=id_, model="m" * (seed % 200), target=pb.Target(index=seed))
    request.timeout.FromNanoseconds(seed * 10**6)
    return pb.AttributeStreamRequest(attribute=request)


@given(st.text(max_size=40), st.integers(0, 10**6), DTYPES, SHAPES)
def test_an_array_that_is_joined_in_is_the_one_that_protobuf_would_have_written(
    id_: str, seed: int, dtype: str, shape: list[int]
) -> None:
    array = np.random.default_rng(seed).integers(0, 100, shape).astype(dtype)
    whole = message(id_, seed)
    whole.attribute.images.tensor.CopyFrom(tensor_message(array))
    assert pb.AttributeStreamRequest.FromString(encode(Outgoing(message(id_, seed), array))) == whole
    assert pb.AttributeStreamRequest.FromString(encode(Outgoing(whole))) == whole


@pytest.mark.parametrize("n", [0, 100, LARGE_BYTES // 4, LARGE_BYTES], ids=str)
def test_maps_are_those_that_protobuf_would_have_read(n: int) -> None:
    maps = np.random.default_rng(0).normal(size=(n, 1, 1)).astype(np.float32)
    whole = pb.AttributeStreamResponse(id="7")
    whole.result.maps.CopyFrom(tensor_message(maps))
    whole.result.maps.scales.append(0.5)
    whole.result.final = True
    raw = whole.SerializeToString()
    seen = decode(raw)
    assert (seen.maps is not None) == (len(raw) >= LARGE_BYTES)
    np.testing.assert_array_equal(array_of(seen.message.result.maps, seen.maps), maps)
    if seen.maps is not None:
        assert seen.maps.obj is raw  # a view, not a copy
        seen.message.result.maps.data = bytes(seen.maps)
    assert seen.message == whole


def test_only_large_arrays_are_worth_it() -> None:
    assert not is_large(np.zeros(LARGE_BYTES - 1, np.uint8))
    assert is_large(np.zeros(LARGE_BYTES, np.uint8))
