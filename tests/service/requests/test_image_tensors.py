"""Images of a request: shapes, data types and lengths that are accepted, and those that are refused."""

import tracemalloc

import grpc
import numpy as np
import pytest
import torch
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server.errors import InvalidArgument
from sidelight_server.wire import requests

from support.messages.checked_server import Service, ask, assert_close, floats, images_of, maps_of, pixels, png

Status = grpc.StatusCode


SHAPES = {
    "no dimension": ([], "0 dimensions", "[N, H, W, C] or [H, W, C]"),
    "one dimension": ([12], "1 dimensions", "[12]"),
    "two dimensions": ([4, 3], "2 dimensions", "[4, 3]"),
    "five dimensions": ([1, 1, 2, 2, 3], "5 dimensions", "[1, 1, 2, 2, 3]"),
    "sixty-five dimensions": ([1] * 65, "65 dimensions"),
    "negative height": ([1, -2, 2, 3], "negative", "[1, -2, 2, 3]"),
    "all negative": ([-1, -2, -2, -3], "negative"),
    "no height": ([1, 0, 2, 3], "dimension of 0", "only N may be 0", "[1, 0, 2, 3]"),
    "no width": ([1, 2, 0, 3], "dimension of 0"),
    "no channel": ([1, 2, 2, 0], "dimension of 0"),
    "no example and no height": ([0, 0, 2, 3], "dimension of 0"),
    "one picture without width": ([2, 0, 3], "dimension of 0", "[2, 0, 3]"),
}


@pytest.mark.parametrize(("shape", "fragments"), [(each[0], each[1:]) for each in SHAPES.values()], ids=SHAPES)
def test_a_shape_that_is_no_batch_is_refused(shape: list[int], fragments: tuple[str, ...], small: Service) -> None:
    data = b"\0" * max(0, int(np.prod(shape, dtype=np.int64)))
    wrong = tensor_pb2.Images(tensor=tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_UINT8, shape=shape, data=data))
    why = small.refuse(ask([], images=wrong), Status.INVALID_ARGUMENT)
    assert why.startswith("images.shape: ")
    for each in fragments:
        assert each in why


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_without_channels_height_or_width_are_refused(dtype: str, bare: Service) -> None:
    for shape in ([1, 0, 4, 5], [1, 3, 0, 5], [1, 3, 4, 0]):
        why = bare.refuse(ask(np.zeros(shape, dtype)), Status.INVALID_ARGUMENT)
        assert "only N may be 0 in [N, C, H, W]" in why


LENGTHS = {
    "one byte short": ([1, 2, 2, 3], 4, b"\0" * 47, ("12 elements", "float32 needs 48 bytes", "data has 47")),
    "one byte long": ([1, 2, 2, 3], 1, b"\0" * 13, ("12 elements", "uint8 needs 12 bytes", "data has 13")),
    "no data": ([1, 3, 32, 32], 5, b"", ("float64 needs 24576 bytes", "data has 0")),
    "data of no examples": ([0, 2, 2, 3], 1, b"\0", ("0 elements", "data has 1")),
    "half a bfloat16": ([1, 1, 1, 1], 3, b"\0", ("bfloat16 needs 2 bytes", "data has 1")),
    "huge": ([10**9, 10**9, 10**9, 3], 1, b"\0" * 12, ("data has 12",)),
    "as huge as numbers go": ([2**63 - 1] * 4, 5, b"\0" * 12, ("data has 12",)),
    "a product that wraps around to 0": ([2**32, 2**32, 1, 1], 1, b"", ("18446744073709551616 elements",)),
}


@pytest.mark.parametrize(("shape", "dtype", "data", "fragments"), LENGTHS.values(), ids=LENGTHS)
def test_data_of_another_length_than_its_shape_is_refused(
    shape: list[int], dtype: tensor_pb2.DataType, data: bytes, fragments: tuple[str, ...], small: Service
) -> None:
    wrong = tensor_pb2.Images(tensor=tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data))
    why = small.refuse(ask([], images=wrong), Status.INVALID_ARGUMENT)
    assert f"images: shape {shape}" in why
    for each in fragments:
        assert each in why


BOASTS = {
    "short data": ([10**9, 10**9, 10**9, 3], b"\0" * 12),
    "no examples": ([0, 10**10, 10**10, 3], b""),
    "no examples, numbers at their largest": ([0, 2**63 - 1, 2**63 - 1, 2**63 - 1], b""),
    "ten thousand dimensions": ([2**62] * 10_000, b"\0" * 12),
}


@pytest.mark.parametrize(("shape", "data"), BOASTS.values(), ids=BOASTS)
def test_a_shape_that_is_larger_than_its_data_allocates_nothing(shape: list[int], data: bytes) -> None:
    message = ask([], images=tensor_pb2.Images(tensor=tensor_pb2.Tensor(dtype=1, shape=shape, data=data)))
    tracemalloc.start()
    with pytest.raises(InvalidArgument) as caught:
        requests.parse(message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert "images" in caught.value.message


@pytest.mark.parametrize("shape", [shape for shape, data in BOASTS.values() if not data], ids=str)
def test_an_empty_batch_of_too_large_a_shape_is_refused(shape: list[int], small: Service) -> None:
    wrong = tensor_pb2.Images(tensor=tensor_pb2.Tensor(dtype=1, shape=shape))
    assert "too large" in small.refuse(ask([], images=wrong), Status.INVALID_ARGUMENT)


@pytest.mark.parametrize(
    "nothing",
    [pixels(0, 32, 32, 3), pixels(0, 7, 9, 3), floats(0, 3, 32, 32), []],
    ids=["pixels", "pixels of another size", "floats", "files"],
)
def test_no_examples_are_answered_with_no_maps(nothing: np.ndarray | list[bytes], small: Service) -> None:
    result = small.answer(ask(nothing, id="none", output=pb.Output(probabilities=True))).result
    assert list(result.maps.shape) == [0, 32, 32]
    assert result.maps.data == b""
    assert list(result.probabilities.shape) == [0, 10]
    assert not result.examples
    assert not result.failures
    assert result.final


def test_no_examples_without_reduction_keep_their_channels(small: Service) -> None:
    result = small.answer(ask(pixels(0, 32, 32, 3), channels=pb.CHANNEL_REDUCTION_NONE)).result
    assert list(result.maps.shape) == [0, 3, 32, 32]


def test_no_examples_have_the_shape_they_came_in_where_the_model_takes_any(bare: Service) -> None:
    assert list(bare.answer(ask(floats(0, 3, 4, 5))).result.maps.shape) == [0, 4, 5]


@pytest.mark.parametrize("one", [pixels(32, 32, 3), floats(3, 32, 32)], ids=["pixels", "floats"])
def test_one_example_without_n_is_a_batch_of_one(one: np.ndarray, small: Service) -> None:
    maps = maps_of(small.answer(ask(one)))
    assert maps.shape == (1, 32, 32)
    assert_close(maps, maps_of(small.answer(ask(one[None]))))


@pytest.mark.parametrize("number", [0, 99, -1], ids=["unspecified", "unknown", "negative"])
def test_an_unknown_data_type_is_refused_with_the_known_ones(number: int, small: Service) -> None:
    images = images_of(pixels(1, 32, 32, 3))
    images.tensor.dtype = number
    why = small.refuse(ask([], images=images), Status.INVALID_ARGUMENT)
    assert why.startswith("images.dtype: ")
    for name, each in tensor_pb2.DataType.items():
        assert (name in why.partition("expected")[2]) == bool(each)
    assert number == 0 or f"unknown number {number}" in why


def test_scales_are_refused(small: Service) -> None:
    images = images_of(pixels(1, 32, 32, 3))
    images.tensor.scales.append(0.5)
    assert "images.scales: 1 of them" in small.refuse(ask([], images=images), Status.INVALID_ARGUMENT)


@pytest.mark.parametrize(
    ("source", "fragments"),
    [
        (floats(1, 3, 16, 32), ("[3, 16, 32]", "[3, 32, 32]", "uint8 pixels")),
        (floats(1, 32, 32, 3), ("[32, 32, 3]", "[C, H, W] = [3, 32, 32]")),
        (floats(0, 1, 32, 32), ("[1, 32, 32]", "[3, 32, 32]")),
        (pixels(1, 32, 32, 5), ("5 channels", "the model takes 3")),
        (pixels(2, 3, 32, 32), ("32 channels", "the model takes 3")),
    ],
    ids=[
        "floats of another height",
        "floats channels last",
        "no floats of one channel",
        "pixels of five channels",
        "pixels channels first",
    ],
)
def test_images_that_do_not_fit_the_model_are_refused(
    source: np.ndarray, fragments: tuple[str, ...], small: Service
) -> None:
    why = small.refuse(ask(source), Status.INVALID_ARGUMENT)
    assert why.startswith("image")
    for each in fragments:
        assert each in why


@pytest.mark.parametrize("source", [pixels(1, 4, 5, 3), [png(Image.new("RGB", (5, 4)))]], ids=["pixels", "files"])
def test_a_model_without_an_input_size_takes_floats_alone(source: np.ndarray | list[bytes], bare: Service) -> None:
    why = bare.refuse(ask(source), Status.FAILED_PRECONDITION)
    assert 'model "bare" has no input size' in why
    assert "floating arrays [N, C, H, W]" in why


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_read_as_their_declared_type(dtype: str, small: Service) -> None:
    """Values that every type holds exactly: so the maps are the very same."""
    exact = floats(3, 3, 32, 32).astype(np.float16)
    expected = small.answer(ask(exact.astype(np.float32))).result
    answered = small.answer(ask(exact.astype(dtype))).result
    assert answered.maps.data == expected.maps.data
    assert np.count_nonzero(np.frombuffer(expected.maps.data, "<f4")) > 3 * 512


def test_bfloat16_is_read_as_the_upper_half_of_float32(small: Service) -> None:
    exact = torch.from_numpy(floats(3, 3, 32, 32)).bfloat16()
    as_bytes = exact.view(torch.uint8).numpy().tobytes()
    shape = list(exact.shape)
    images = tensor_pb2.Images(
        tensor=tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BFLOAT16, shape=shape, data=as_bytes)
    )
    expected = small.answer(ask(exact.float().numpy())).result
    assert small.answer(ask([], images=images)).result.maps.data == expected.maps.data


REGION = tensor_pb2.SharedTensor(region="r", dtype=tensor_pb2.DATA_TYPE_UINT8, shape=[1, 32, 32, 3])
SHARED = {
    "images": ({"images": tensor_pb2.Images(shared=REGION)}, "images.shared: "),
    "maps": ({"output": pb.Output(region=tensor_pb2.SharedTensor(region="r"))}, "output.region: "),
}


@pytest.mark.parametrize(("fields", "field"), SHARED.values(), ids=SHARED)
def test_a_unary_call_has_no_regions(fields: dict[str, object], field: str, small: Service) -> None:
    why = small.refuse(ask(pixels(1, 32, 32, 3), **fields), Status.INVALID_ARGUMENT)
    assert why.startswith(field)
    assert "unary" in why
