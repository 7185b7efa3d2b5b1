"""Numbers at the ends of their range, in every field of a request."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest
import sidelight_server
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from support.messages.checked_server import (
    Service,
    ask,
    assert_close,
    assert_no_internals,
    floats,
    images_of,
    maps_of,
    pixels,
    tensor,
)
from support.messages.examples import METHODS, TARGETS
from support.profiles import n_examples

Status = grpc.StatusCode


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


# Statuses that a caller's own numbers may cause: about the request, or about its size.
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
    assert_close(maps_of(narrow.answer(narrow.good)), narrow.maps)  # so every permit was released


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
