"""Parsing of requests: each is answered, or rejected with the name of the wrong field."""

import dataclasses
import io
import math
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sidelight_server
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc, tensor_pb2
from sidelight_server.engine.request_cost import BYTES_OF_EXAMPLE
from sidelight_server.errors import InvalidArgument
from sidelight_server.wire import requests
from sidelight_server.wire.methods import CLASSES
from sidelight_server.wire.tensors import encoded
from torch import nn

from support.models import Linear, small_cnn
from support.profiles import n_examples
from support.tolerances import NEIGHBORS

Status = grpc.StatusCode
Stub = attribution_pb2_grpc.AttributionServiceStub

TIMEOUT_S = 20.0
SMALL_LIMIT = 14_000  # bytes: one example of the small CNN fits, two do not


def tensor(array: np.ndarray) -> tensor_pb2.Tensor:
    dtype = tensor_pb2.DataType.Value(f"DATA_TYPE_{array.dtype.name.upper()}")
    return tensor_pb2.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


def images_of(source: np.ndarray | list[bytes]) -> tensor_pb2.Images:
    if isinstance(source, list):
        return tensor_pb2.Images(encoded=tensor_pb2.EncodedImages(files=source))
    return tensor_pb2.Images(tensor=tensor(source))


def ask(source: np.ndarray | list[bytes], /, **fields: object) -> pb.AttributeRequest:
    """A good request, or one with other fields."""
    good = {
        "images": images_of(source),
        "target": pb.Target(predicted=pb.PredictedTarget()),
        "method": pb.Method(gradient=pb.GradientMethod()),
    }
    return pb.AttributeRequest(**(good | fields))


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def maps_of(response: pb.AttributeResponse) -> np.ndarray:
    maps = response.result.maps
    assert maps.dtype == tensor_pb2.DATA_TYPE_FLOAT32
    return np.frombuffer(maps.data, "<f4").reshape(tuple(maps.shape))


def assert_close(maps: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(maps, expected, rtol=0, atol=NEIGHBORS * np.nanmax(expected))


@dataclass(frozen=True)
class Service:
    """A server, and what it answered before anything went wrong."""

    stub: Stub
    good: pb.AttributeRequest
    maps: np.ndarray

    @classmethod
    def at(cls, channel: grpc.Channel, good: pb.AttributeRequest) -> "Service":
        stub = Stub(channel)
        return cls(stub, good, maps_of(stub.Attribute(good, timeout=TIMEOUT_S)))

    def answer(self, request: pb.AttributeRequest) -> pb.AttributeResponse:
        return self.stub.Attribute(request, timeout=TIMEOUT_S)

    def refuse(self, request: pb.AttributeRequest, code: grpc.StatusCode) -> str:
        """Return why a request was refused, and check that the next good one is answered as before."""
        with pytest.raises(grpc.RpcError) as caught:
            self.stub.Attribute(request, timeout=TIMEOUT_S)
        assert caught.value.code() is code, caught.value.details()
        assert_no_internals(caught.value.details())
        assert_close(maps_of(self.answer(self.good)), self.maps)
        return caught.value.details()


def assert_no_internals(message: str) -> None:
    for secret in ("Traceback", 'File "', str(Path(sidelight_server.__file__).parent), sys.prefix):
        assert secret not in message


@pytest.fixture(scope="module")
def small(address: str) -> Iterator[Service]:
    """The small CNN with labels, [3, 32, 32]."""
    with grpc.insecure_channel(address) as channel:
        yield Service.at(channel, ask(pixels(2, 32, 32, 3), id="good"))


@pytest.fixture(scope="module")
def bare(device: str) -> Iterator[Service]:
    """A model without an input size or labels."""
    with (
        sidelight_server.serve(Linear(shape=(3, 4, 5)), device=device, name="bare") as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield Service.at(channel, ask(floats(2, 3, 4, 5)))


@pytest.fixture(scope="module")
def probabilistic(device: str) -> Iterator[Service]:
    """A model that returns probabilities."""
    module = nn.Sequential(Linear(shape=(3, 4, 5)), nn.Softmax(dim=1))
    with (
        sidelight_server.serve(module, output_kind="probabilities", device=device) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield Service.at(channel, ask(floats(2, 3, 4, 5)))


@pytest.fixture(scope="module")
def tight(device: str) -> Iterator[Service]:
    """The small CNN on a server with a low limit on messages; the caller has none."""
    with (
        sidelight_server.serve(
            small_cnn(), input_size=(3, 32, 32), max_message_bytes=SMALL_LIMIT, device=device
        ) as address,
        grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel,
    ):
        yield Service.at(channel, ask(pixels(2, 8, 8, 3)))


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
def test_a_shape_that_boasts_allocates_nothing(shape: list[int], data: bytes) -> None:
    message = ask([], images=tensor_pb2.Images(tensor=tensor_pb2.Tensor(dtype=1, shape=shape, data=data)))
    tracemalloc.start()
    with pytest.raises(InvalidArgument) as caught:
        requests.parse(message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert "images" in caught.value.message


@pytest.mark.parametrize("shape", [shape for shape, data in BOASTS.values() if not data], ids=str)
def test_no_examples_of_a_boasting_shape_are_refused(shape: list[int], small: Service) -> None:
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
def test_a_dtype_that_is_none_is_refused_with_the_known_ones(number: int, small: Service) -> None:
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
def test_other_floats_are_read_as_what_they_say(dtype: str, small: Service) -> None:
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


@pytest.mark.parametrize("field", ["images", "target", "method"])
@pytest.mark.parametrize("emptied", [False, True], ids=["unset", "set to nothing"])
def test_what_is_required_is_required(field: str, emptied: bool, small: Service) -> None:
    request = ask(pixels(1, 32, 32, 3))
    request.ClearField(field)
    if emptied:
        getattr(request, field).SetInParent()
    assert small.refuse(request, Status.INVALID_ARGUMENT).startswith(f"{field}: ")


@pytest.mark.parametrize("field", ["target", "method"])
def test_what_is_newer_than_the_server_is_refused_with_what_it_knows(field: str, small: Service) -> None:
    """Field 99 of an empty message: an older server reads it as unset, and must not serve something else."""
    request = ask(pixels(1, 32, 32, 3))
    request.ClearField(field)
    getattr(request, field).MergeFromString(b"\x9a\x06\x00")
    why = small.refuse(request, Status.INVALID_ARGUMENT)
    assert "newer than this server" in why
    known = {"target": pb.Target.DESCRIPTOR, "method": pb.Method.DESCRIPTOR}[field].oneofs[0].fields
    assert all(each.name in why for each in known)


def set_score(request: pb.AttributeRequest, number: int) -> None:
    request.score = number


def set_channels(request: pb.AttributeRequest, number: int) -> None:
    request.channels = number


def set_magnitude(request: pb.AttributeRequest, number: int) -> None:
    request.method.gradient.magnitude = number


def set_map_dtype(request: pb.AttributeRequest, number: int) -> None:
    request.output.map_dtype = number


ENUMS = {
    "score": (set_score, "score", model_pb2.Score, []),
    "channels": (set_channels, "channels", pb.ChannelReduction, []),
    "magnitude": (set_magnitude, "method.gradient.magnitude", pb.Magnitude, []),
    "map dtype": (
        set_map_dtype,
        "output.map_dtype",
        tensor_pb2.DataType,
        ["DATA_TYPE_BFLOAT16", "DATA_TYPE_FLOAT64"],
    ),
}
Setter = Callable[[pb.AttributeRequest, int], None]


@pytest.mark.parametrize(("setter", "field", "enum", "unserved"), ENUMS.values(), ids=ENUMS)
@pytest.mark.parametrize("number", [99, -1, 2**31 - 1], ids=["unknown", "negative", "largest"])
def test_an_unknown_number_is_refused_with_the_known_ones(
    number: int, setter: Setter, field: str, enum: object, unserved: list[str], small: Service
) -> None:
    request = ask(pixels(1, 32, 32, 3))
    setter(request, number)
    why = small.refuse(request, Status.INVALID_ARGUMENT)
    assert why.startswith(f"{field}: unknown number {number}")
    for name, each in enum.items():
        assert (name in why) == (each != 0 and name not in unserved)


@pytest.mark.parametrize(
    ("setter", "field", "number"),
    [
        pytest.param(setter, field, enum.Value(name), id=name)
        for setter, field, enum, names in ENUMS.values()
        for name in names
    ],
)
def test_a_known_number_that_is_not_served_is_unimplemented(
    setter: Setter, field: str, number: int, small: Service
) -> None:
    request = ask(pixels(1, 32, 32, 3))
    setter(request, number)
    why = small.refuse(request, Status.UNIMPLEMENTED)
    assert why.startswith(f"{field}: ")
    assert "not served by this version; expected one of" in why


@pytest.mark.parametrize(("setter", "field", "enum", "unserved"), ENUMS.values(), ids=ENUMS)
def test_every_other_number_is_served(
    setter: Setter, field: str, enum: object, unserved: list[str], small: Service
) -> None:
    for name, number in enum.items():
        if name not in unserved:
            request = ask(pixels(1, 32, 32, 3))
            setter(request, number)
            assert not small.answer(request).result.failures


METHODS = {
    "gradient": pb.GradientMethod(),
    "smoothgrad": pb.SmoothGradMethod(samples=2, noise_level=0.1),
    "integrated_gradients": pb.IntegratedGradientsMethod(steps=2),
    "expected_gradients": pb.ExpectedGradientsMethod(samples=2),
    "grad_cam": pb.GradCamMethod(),
    "layer_gradient_x_activation": pb.LayerGradientXActivationMethod(),
    "occlusion": pb.OcclusionMethod(window_height=16, window_width=16),
    "rise": pb.RiseMethod(masks=2, cells=4, keep_probability=0.5),
    "guided_backpropagation": pb.GuidedBackpropagationMethod(),
}
TARGETS = {
    "predicted": pb.PredictedTarget(),
    "index": 3,
    "label": "dog",
    "per_example": pb.PerExampleTarget(classes=[pb.ClassChoice(index=3)]),
    "top_k": pb.TopKTarget(k=2),
    "contrast": pb.ContrastTarget(positive=pb.ClassChoice(index=3), negative=pb.ClassChoice(label="dog")),
}


@pytest.mark.parametrize("name", [field.name for field in pb.Method.DESCRIPTOR.oneofs[0].fields])
def test_every_method_of_the_schema_is_served(name: str, small: Service) -> None:
    request = ask(pixels(1, 32, 32, 3), method=pb.Method(**{name: METHODS[name]}))
    result = small.answer(request).result
    assert not result.failures
    assert list(result.maps.shape) == [1, 32, 32]
    assert result.provenance.method.WhichOneof("method") == name


@pytest.mark.parametrize("name", [field.name for field in pb.Target.DESCRIPTOR.oneofs[0].fields])
def test_every_target_of_the_schema_is_served(name: str, small: Service) -> None:
    if name == "dense":  # not of a model that answers for the whole picture
        request = ask(pixels(1, 32, 32, 3), target=pb.Target(dense=pb.DenseTarget(choice=pb.ClassChoice(index=3))))
        assert "target.dense" in small.refuse(request, Status.FAILED_PRECONDITION)
        return
    request = ask(pixels(1, 32, 32, 3), target=pb.Target(**{name: TARGETS[name]}))
    result = small.answer(request).result
    assert not result.failures
    assert list(result.maps.shape) == ([1, 2, 32, 32] if name == "top_k" else [1, 32, 32])
    assert result.provenance.target == request.target


Step = str | int


def numbers_of(message: Message, path: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], FieldDescriptor]]:
    """Yield where a message has numbers, in all its parts that are set, and what they are."""
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        places = [(*path, field.name, i) for i in range(len(value))] if field.is_repeated else [(*path, field.name)]
        for place in places:
            if field.type != field.TYPE_MESSAGE:
                if field.cpp_type in EXTREMES:
                    yield place, field
            elif field.is_repeated or message.HasField(field.name):
                yield from numbers_of(at(message, place[len(path) :]), place)


def at(message: Any, path: Sequence[Step]) -> Any:
    for step in path:
        message = message[step] if isinstance(step, int) else getattr(message, step)
    return message


def put(message: Message, path: Sequence[Step], value: float) -> None:
    *way, last = path
    if isinstance(last, int):
        at(message, way)[last] = value
    else:
        setattr(at(message, way), last, value)


EXTREMES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), -1, 0, 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), -1, 0, 2**31, 2**63 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), -1, 0, 2**31 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: (-math.inf, -1.7e308, -1.0, 0.0, 5e-324, 3.5e38, 1.7e308, math.inf, math.nan),
}


def with_baseline(method: Message, **baseline: Any) -> Message:
    whole = type(method)()
    whole.CopyFrom(method)
    whole.baseline.CopyFrom(pb.Baseline(**baseline))
    return whole


# What a caller's own numbers may end in: a word about the request, or about its size.
REFUSED = {
    each.value[0]
    for each in (
        Status.INVALID_ARGUMENT,
        Status.FAILED_PRECONDITION,
        Status.NOT_FOUND,
        Status.UNIMPLEMENTED,  # an enum's number from a newer schema
        Status.RESOURCE_EXHAUSTED,
        Status.DEADLINE_EXCEEDED,
    )
}
WITH_NUMBERS = {
    **{f"target.{name}": {"target": pb.Target(**{name: each})} for name, each in TARGETS.items()},
    "target.dense": {"target": pb.Target(dense=pb.DenseTarget(region=tensor_pb2.Box(height=1, width=1)))},
    **{f"method.{name}": {"method": pb.Method(**{name: each})} for name, each in METHODS.items()},
    **{
        f"method.{name}.{kind}": {"method": pb.Method(**{name: with_baseline(METHODS[name], **{kind: baseline})})}
        for name in ("integrated_gradients", "occlusion")
        for kind, baseline in {
            "constant": 1.0,
            "blurred": pb.BlurredBaseline(sigma=1),
            "tensor": tensor(floats(3, 32, 32)),
        }.items()
    },
    "method.smoothgrad.tolerance": {
        "method": pb.Method(smoothgrad=pb.SmoothGradMethod(noise_level=0.1, tolerance=0.5, max_rows=20))
    },
    "method.integrated_gradients.tolerance": {
        "method": pb.Method(integrated_gradients=pb.IntegratedGradientsMethod(tolerance=0.5, max_rows=20))
    },
    "output": {"output": pb.Output(region=tensor_pb2.SharedTensor(region="r"))},
    "timeout": {"timeout": Duration(seconds=20)},
    "served_classes": {"served_classes": pb.ServedPredictions(classes=[pb.ClassChoice(index=3)])},
    "images": {"images": images_of(pixels(1, 32, 32, 3))},
    "images.shared": {
        "images": tensor_pb2.Images(
            shared=tensor_pb2.SharedTensor(
                region="r", dtype=tensor_pb2.DATA_TYPE_UINT8, shape=[1, 32, 32, 3], offset_bytes=1
            )
        )
    },
    "score": {},
}


@pytest.fixture(scope="module")
def narrow(spec: sidelight_server.ModelSpec, device: str) -> Iterator[Service]:
    """A server that is full as soon as a few permits are lost."""
    with (
        sidelight_server.serve(spec, device=device, max_in_flight=4, max_example_rows=64) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield Service.at(channel, ask(pixels(2, 32, 32, 3), id="good"))


def answered_codes(service: Service, request: pb.AttributeRequest) -> set[int]:
    try:
        return {failure.code for failure in service.answer(request).result.failures}
    except grpc.RpcError as error:
        assert_no_internals(error.details())
        return {error.code().value[0]}


def whole_request(name: str) -> pb.AttributeRequest:
    return ask(pixels(1, 32, 32, 3), **WITH_NUMBERS[name])


@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_no_number_of_a_request_ends_in_an_internal_error(name: str, narrow: Service) -> None:
    for path, field in numbers_of(whole_request(name)):
        if path[0] != name.partition(".")[0]:  # the same in each request
            continue
        for extreme in EXTREMES[field.cpp_type]:
            request = whole_request(name)
            put(request, path, extreme)
            assert answered_codes(narrow, request) <= REFUSED, (path, extreme)
    assert_close(maps_of(narrow.answer(narrow.good)), narrow.maps)  # so every permit was given back


@settings(max_examples=n_examples(60))
@given(data=st.data())
def test_no_numbers_together_end_in_an_internal_error(data: st.DataObject, narrow: Service) -> None:
    request = whole_request(data.draw(st.sampled_from(sorted(WITH_NUMBERS))))
    for _ in range(data.draw(st.integers(1, 6))):
        path, field = data.draw(st.sampled_from(list(numbers_of(request))))
        put(request, path, data.draw(st.sampled_from(EXTREMES[field.cpp_type])))
    assert answered_codes(narrow, request) <= REFUSED
    assert_close(maps_of(narrow.answer(narrow.good)), narrow.maps)


@pytest.mark.parametrize("k", [-(2**31), -3, 0])
def test_top_k_counts_from_one(k: int, small: Service) -> None:
    request = ask(pixels(1, 32, 32, 3), target=pb.Target(top_k=pb.TopKTarget(k=k)))
    assert f"target.top_k.k: got {k}" in small.refuse(request, Status.INVALID_ARGUMENT)


def nested(depth: int) -> pb.Method:
    """SmoothGrad over SmoothGrad over …"""
    method = pb.Method(gradient=pb.GradientMethod())
    for _ in range(depth):
        method = pb.Method(smoothgrad=pb.SmoothGradMethod(samples=1, base=method))
    return method


def test_methods_are_not_nested_without_end(small: Service) -> None:
    why = small.refuse(ask(pixels(1, 32, 32, 3), method=nested(40)), Status.INVALID_ARGUMENT)
    assert why.startswith("method.smoothgrad.base: smoothgrad, expected")


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


def test_reloading_is_not_allowed_unless_the_operator_says_so(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        models = model_pb2_grpc.ModelServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            models.ReloadModel(model_pb2.ReloadModelRequest(name="small"), timeout=TIMEOUT_S)
    assert caught.value.code() is Status.PERMISSION_DENIED
    assert "allow_reload" in caught.value.details()


@pytest.mark.parametrize("id_", ["x" * 129, "é" * 65], ids=["letters", "letters of two bytes"])
def test_a_long_id_is_refused(id_: str, small: Service) -> None:
    why = small.refuse(ask(pixels(1, 32, 32, 3), id=id_), Status.INVALID_ARGUMENT)
    assert why == f"id: {len(id_.encode())} bytes, expected at most 128"


def test_an_id_of_the_greatest_length_comes_back(small: Service) -> None:
    assert small.answer(ask(pixels(1, 32, 32, 3), id="é" * 64)).id == "é" * 64


@pytest.mark.parametrize(
    "timeout",
    [Duration(), Duration(seconds=-1), Duration(nanos=-1), Duration(seconds=1, nanos=-1_500_000_000)],
    ids=["zero", "negative", "a nanosecond too few", "negative in sum"],
)
def test_a_timeout_that_is_not_positive_is_refused(timeout: Duration, small: Service) -> None:
    why = small.refuse(ask(pixels(1, 32, 32, 3), timeout=timeout), Status.INVALID_ARGUMENT)
    assert why.startswith("timeout: ")
    assert "expected a positive time" in why


def test_the_longest_timeout_is_taken(small: Service) -> None:
    longest = Duration(seconds=2**63 - 1, nanos=999_999_999)
    assert small.answer(ask(pixels(1, 32, 32, 3), timeout=longest)).result.final


def index(number: int) -> pb.Target:
    return pb.Target(index=number)


def label(name: str) -> pb.Target:
    return pb.Target(label=name)


def each(*choices: int | str | None) -> pb.Target:
    classes = [
        pb.ClassChoice()
        if choice is None
        else pb.ClassChoice(label=choice)
        if isinstance(choice, str)
        else pb.ClassChoice(index=choice)
        for choice in choices
    ]
    return pb.Target(per_example=pb.PerExampleTarget(classes=classes))


WRONG_TARGETS = {
    "index past the last": (index(10), Status.INVALID_ARGUMENT, ("class index 10", "0 to 9")),
    "largest index": (index(2**63 - 1), Status.INVALID_ARGUMENT, (f"class index {2**63 - 1}", "0 to 9")),
    "negative index": (index(-1), Status.INVALID_ARGUMENT, ("class index -1", "0 to 9")),
    "unknown label": (label("cot"), Status.NOT_FOUND, ('"cot"', "did you mean", '"cat"')),
    "unknown label, none near": (label("zzzzzz"), Status.NOT_FOUND, ('"zzzzzz"', "known", '"ant"')),
    "label in other letters": (label("ANT"), Status.NOT_FOUND, ('"ANT"',)),
    "empty label": (label(""), Status.NOT_FOUND, ('""',)),
    "label of two classes": (label("cat"), Status.INVALID_ARGUMENT, ('"cat"', "2, 3", "indices")),
    "too few for the examples": (each(1), Status.INVALID_ARGUMENT, ("1 classes for 2 examples",)),
    "too many for the examples": (each(1, 2, 3), Status.INVALID_ARGUMENT, ("3 classes for 2 examples",)),
    "none for the examples": (each(), Status.INVALID_ARGUMENT, ("0 classes for 2 examples",)),
    "one of them unset": (each(1, None), Status.INVALID_ARGUMENT, ("class choice is unset",)),
    "one of them out of range": (each(1, 10), Status.INVALID_ARGUMENT, ("class index 10", "0 to 9")),
    "one of them unknown": (each(1, "bea"), Status.NOT_FOUND, ('"bea"', '"bee"')),
    "one of them of two classes": (each("cat", 1), Status.INVALID_ARGUMENT, ('"cat"', "2, 3")),
}


@pytest.mark.parametrize(("target", "code", "fragments"), WRONG_TARGETS.values(), ids=WRONG_TARGETS)
def test_a_target_that_is_not_there_is_refused(
    target: pb.Target, code: grpc.StatusCode, fragments: tuple[str, ...], small: Service
) -> None:
    why = small.refuse(ask(pixels(2, 32, 32, 3), target=target), code)
    assert why.startswith("target: ")
    for fragment in fragments:
        assert fragment in why


def test_each_example_has_its_own_target(small: Service) -> None:
    result = small.answer(ask(pixels(3, 32, 32, 3), target=each(7, "dog", 0))).result
    explained = [(example.targets[0].index, example.targets[0].label) for example in result.examples]
    assert explained == [(7, "gnu"), (4, "dog"), (0, "ant")]


def test_a_label_of_a_model_without_labels_is_not_found(bare: Service) -> None:
    assert "there are none" in bare.refuse(ask(floats(1, 3, 4, 5), target=label("cat")), Status.NOT_FOUND)


def test_an_unknown_model_is_not_found_and_the_near_one_named(small: Service) -> None:
    why = small.refuse(ask(pixels(1, 32, 32, 3), model="smal"), Status.NOT_FOUND)
    assert '"smal"' in why
    assert 'did you mean "small"?' in why


@pytest.mark.parametrize("letter", ["x", "é", "\N{GRINNING FACE}", "\n"], ids=["ascii", "é", "emoji", "newline"])
def test_a_long_name_does_not_hide_the_status(letter: str, small: Service) -> None:
    """gRPC answers trailers of more than 8 KiB with a status of its own."""
    assert "model: " in small.refuse(ask(pixels(1, 32, 32, 3), model=letter * 100_000), Status.NOT_FOUND)
    assert "target: " in small.refuse(ask(pixels(1, 32, 32, 3), target=label(letter * 100_000)), Status.NOT_FOUND)


def test_a_score_that_the_model_cannot_give_is_refused_with_those_it_can(probabilistic: Service) -> None:
    why = probabilistic.refuse(ask(floats(1, 3, 4, 5), score=model_pb2.SCORE_LOGIT), Status.FAILED_PRECONDITION)
    assert "has no logit" in why
    assert "probability, log_probability" in why


def test_an_answer_over_the_message_limit_is_refused_before_it_is_computed(tight: Service) -> None:
    request = ask(pixels(2, 8, 8, 3), channels=pb.CHANNEL_REDUCTION_NONE)
    why = tight.refuse(request, Status.RESOURCE_EXHAUSTED)
    assert f"{2 * 3 * 32 * 32 * 4} bytes" in why
    assert f"max_message_bytes is {SMALL_LIMIT}" in why
    assert "send fewer examples" in why


def test_a_request_over_the_message_limit_is_refused(tight: Service) -> None:
    why = tight.refuse(ask(floats(2, 3, 32, 32)), Status.RESOURCE_EXHAUSTED)
    assert str(SMALL_LIMIT) in why


def test_a_batch_over_all_the_bytes_in_flight_is_refused_for_good(device: str) -> None:
    room = 2 * (2 * (192 + 4 * 32 * 32 + 3 * 32 * 32) + BYTES_OF_EXAMPLE) + 500  # for two, with maps and pixels
    with (
        sidelight_server.serve(small_cnn(), input_size=(3, 32, 32), max_in_flight_bytes=room, device=device) as at,
        grpc.insecure_channel(at) as channel,
    ):
        service = Service.at(channel, ask(pixels(2, 8, 8, 3)))
        why = service.refuse(ask(pixels(4, 8, 8, 3)), Status.RESOURCE_EXHAUSTED)
        assert f"max_in_flight_bytes is {room}" in why


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
def test_no_pattern_of_bfloat16_is_more_than_its_example_s_fault(bits: int, dtype: torch.dtype) -> None:
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


def test_a_shape_that_a_model_without_an_input_size_cannot_take_is_the_caller_s_fault(bare: Service) -> None:
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


def test_finite_pixels_whose_sum_overflows_are_no_fault(bare: Service) -> None:
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


def test_every_method_of_the_schema_has_a_class_whose_parameters_are_its_fields() -> None:
    """Messages and methods are converted by these names."""
    assert set(pb.Method.DESCRIPTOR.fields_by_name) == set(CLASSES)
    for field in pb.Method.DESCRIPTOR.fields:
        parameters = {re.sub("_(height|width)$", "", each.name) for each in field.message_type.fields}
        has = {each.name for each in dataclasses.fields(CLASSES[field.name])}
        # Guided backpropagation is a gradient whose options are fixed.
        assert parameters == has or (field.name == "guided_backpropagation" and not parameters)
