"""Examples that fail without the others of their batch."""

import grpc
import numpy as np
import pytest
import sidelight_server
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server.wire.tensors import encoded

from support.messages.checked_server import (
    TIMEOUT_S,
    Service,
    Stub,
    ask,
    assert_close,
    assert_no_internals,
    floats,
    maps_of,
    pixels,
    png,
)
from support.models import Linear, small_cnn

Status = grpc.StatusCode


def good_files() -> list[bytes]:
    return [png(Image.fromarray(pixels(40, 50, 3, seed=seed))) for seed in (1, 2)]


def test_a_bad_file_fails_alone(small: Service) -> None:
    first, second = good_files()
    bomb = png(Image.new("1", (10_000, 10_000)))
    files = [b"no picture", first, first[: len(first) // 2], bomb, second, b""]
    result = small.answer(ask(files, output=pb.Output(probabilities=True))).result

    failures = {failure.example: failure for failure in result.failures}
    assert list(failures) == [0, 2, 3, 5]
    assert {failure.code for failure in failures.values()} == {Status.INVALID_ARGUMENT.value[0]}
    for failure in failures.values():
        assert_no_internals(failure.message)
    assert "not a PNG" in failures[0].message
    assert "truncated" in failures[2].message
    assert "100,000,000 pixels, max_image_pixels is 50,000,000" in failures[3].message
    assert "0 bytes" in failures[5].message

    maps = np.frombuffer(result.maps.data, "<f4").reshape(tuple(result.maps.shape))
    alone = small.answer(ask([first, second], output=pb.Output(probabilities=True)))
    assert np.isnan(maps[list(failures)]).all()
    assert_close(maps[[1, 4]], maps_of(alone))
    assert all(result.examples[place] == pb.Example() for place in failures)
    for place, each in zip((1, 4), alone.result.examples, strict=True):
        assert result.examples[place].prediction.index == each.prediction.index
        assert result.examples[place].geometry == each.geometry
        assert each.geometry.original_width == 50
    probabilities = np.frombuffer(result.probabilities.data, "<f4").reshape(6, 10)
    assert np.isnan(probabilities[list(failures)]).all()
    np.testing.assert_allclose(probabilities[[1, 4]].sum(axis=1), 1, rtol=1e-5)
    assert_close(maps_of(small.answer(small.good)), small.maps)


def test_a_batch_of_bad_files_alone_is_answered(small: Service) -> None:
    result = small.answer(ask([b"", b"no picture"], output=pb.Output(probabilities=True))).result
    assert [failure.example for failure in result.failures] == [0, 1]
    assert list(result.maps.shape) == [2, 32, 32]
    assert np.isnan(np.frombuffer(result.maps.data, "<f4")).all()
    assert list(result.probabilities.shape) == [2, 10]
    assert_close(maps_of(small.answer(small.good)), small.maps)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_example_that_is_not_finite_fails_alone(dtype: str, small: Service) -> None:
    source = floats(5, 3, 32, 32).astype(dtype)
    source[1, 0, 5, 7] = np.nan
    source[2, 2, 31, 31] = np.inf
    source[4, 1, 0, 0], source[4, 1, 0, 1] = np.inf, -np.inf  # whose sum is NaN
    response = small.answer(ask(source))

    assert [failure.example for failure in response.result.failures] == [1, 2, 4]
    assert {failure.code for failure in response.result.failures} == {Status.INVALID_ARGUMENT.value[0]}
    messages = [failure.message for failure in response.result.failures]
    assert "1 NaN and 0 infinite" in messages[0]
    assert "0 NaN and 1 infinite" in messages[1]
    assert "0 NaN and 2 infinite" in messages[2]
    maps = maps_of(response)
    assert np.isnan(maps[[1, 2, 4]]).all()
    assert_close(maps[[0, 3]], maps_of(small.answer(ask(source[[0, 3]]))))
    assert_close(maps_of(small.answer(small.good)), small.maps)


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F81, 0xFF81, 0xFFFF, 0x7F80])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_no_bits_of_a_bfloat16_fail_more_than_their_own_example(bits: int, dtype: torch.dtype) -> None:
    """Quiet, signaling and negative NaN, and infinity, whatever type the model computes in."""
    patterns = torch.from_numpy(floats(2, 3, 4, 5)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    patterns[0, 1, 2, 3] = bits
    of = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_BFLOAT16, shape=patterns.shape, data=patterns.tobytes())
    with (
        sidelight_server.serve(Linear(shape=(3, 4, 5)).to(dtype), device="cpu") as address,
        grpc.insecure_channel(address) as channel,
    ):
        result = Stub(channel).Attribute(ask([], images=tensor_pb2.Images(tensor=of)), timeout=TIMEOUT_S).result
    (failure,) = result.failures
    assert (failure.example, failure.code) == (0, Status.INVALID_ARGUMENT.value[0])


def test_a_shape_that_a_model_without_an_input_size_cannot_take_is_invalid_argument(bare: Service) -> None:
    for shape in ((2, 4, 5), (4, 4, 5), (3, 5, 5), (3, 1, 1)):
        result = bare.answer(ask(floats(2, *shape))).result
        assert {failure.code for failure in result.failures} == {Status.INVALID_ARGUMENT.value[0]}
        assert f"[C, H, W] = {list(shape)}" in result.failures[1].message
        assert_no_internals(result.failures[0].message)
    assert_close(maps_of(bare.answer(bare.good)), bare.maps)


@pytest.mark.parametrize("size", [(10_000_000, 1), (1, 10_000_000)], ids=["wide", "tall"])
def test_a_picture_that_would_be_too_long_once_it_is_resized_fails_alone(size: tuple[int, int]) -> None:
    thin, plain = Image.new("L", size), Image.new("L", (300, 300))
    with (
        sidelight_server.serve(small_cnn(), input_size=(3, 32, 32), resize=256, device="cpu") as address,
        grpc.insecure_channel(address) as channel,
    ):
        service = Service.at(channel, ask([png(plain)]))
        response = service.answer(ask([png(thin), png(plain)]))
        assert "2,560,000,000" in service.refuse(ask(np.asarray(thin)[None, ..., None]), Status.INVALID_ARGUMENT)
    (failure,) = response.result.failures
    assert (failure.example, failure.code) == (0, Status.INVALID_ARGUMENT.value[0])
    assert_close(maps_of(response)[1:], service.maps)


def test_a_double_that_the_model_cannot_hold_fails_alone(small: Service) -> None:
    source = floats(2, 3, 32, 32).astype(np.float64)
    source[0, 0, 0, 0] = 1e300  # infinite in float32
    response = small.answer(ask(source))
    (failure,) = response.result.failures
    assert (failure.example, failure.code) == (0, Status.INVALID_ARGUMENT.value[0])
    assert "1 infinite" in failure.message
    assert_close(maps_of(response)[1:], maps_of(small.answer(ask(source[1:]))))


def test_finite_pixels_whose_sum_overflows_are_accepted(bare: Service) -> None:
    result = bare.answer(ask(np.full((1, 3, 4, 5), 3e37, np.float32))).result
    assert not result.failures
    assert np.isfinite(np.frombuffer(result.maps.data, "<f4")).all()


@given(
    maps=arrays(np.float32, (3, 2, 4), elements=st.floats(0, float(np.finfo(np.float32).max), width=32)),
    signed=st.booleans(),
)
@example(maps=np.full((3, 2, 4), np.finfo(np.float32).max), signed=True)
def test_each_example_keeps_its_digits_whatever_its_neighbors_are(maps: np.ndarray, signed: bool) -> None:
    """From what is less than a normal number to the largest there is."""
    if signed:
        maps[:, 0] *= -1
    for dtype, step in ((tensor_pb2.DATA_TYPE_FLOAT16, 2**-11), (tensor_pb2.DATA_TYPE_UINT8, 1 / 510)):
        if signed and dtype == tensor_pb2.DATA_TYPE_UINT8:
            continue
        sent = encoded(maps, dtype)
        assert np.isfinite(sent.elements).all()
        for map_, elements, scale in zip(maps, sent.elements, sent.scales, strict=True):
            exact = map_.astype(np.float64)
            assert np.isfinite((elements * np.float64(scale)).astype(np.float32)).all()
            assert np.abs(elements * np.float64(scale) - exact).max() <= step * np.abs(exact).max()
