"""Fields of a request: required ones, unknown ones, and every method, target and number of the schema."""

import dataclasses
import re
from collections.abc import Callable

import grpc
import pytest
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2
from sidelight_server.wire.methods import CLASSES

from support.messages.checked_server import Service, ask, pixels
from support.messages.examples import METHODS, TARGETS

Status = grpc.StatusCode


@pytest.mark.parametrize("field", ["images", "target", "method"])
@pytest.mark.parametrize("emptied", [False, True], ids=["unset", "set to nothing"])
def test_a_request_without_a_required_field_is_refused(field: str, emptied: bool, small: Service) -> None:
    request = ask(pixels(1, 32, 32, 3))
    request.ClearField(field)
    if emptied:
        getattr(request, field).SetInParent()
    assert small.refuse(request, Status.INVALID_ARGUMENT).startswith(f"{field}: ")


@pytest.mark.parametrize("field", ["target", "method"])
def test_a_field_that_is_newer_than_the_server_is_refused_with_the_known_ones(field: str, small: Service) -> None:
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


@pytest.mark.parametrize("name", [field.name for field in pb.Method.DESCRIPTOR.oneofs[0].fields])
def test_every_method_of_the_schema_is_served(name: str, small: Service) -> None:
    request = ask(pixels(1, 32, 32, 3), method=pb.Method(**{name: METHODS[name]}))
    result = small.answer(request).result
    assert not result.failures
    assert list(result.maps.shape) == [1, 32, 32]
    assert result.provenance.method.WhichOneof("method") == name


@pytest.mark.parametrize("name", [field.name for field in pb.Target.DESCRIPTOR.oneofs[0].fields])
def test_every_target_of_the_schema_is_served(name: str, small: Service) -> None:
    if name == "dense":  # not for a model with one output for the whole picture
        request = ask(pixels(1, 32, 32, 3), target=pb.Target(dense=pb.DenseTarget(choice=pb.ClassChoice(index=3))))
        assert "target.dense" in small.refuse(request, Status.FAILED_PRECONDITION)
        return
    request = ask(pixels(1, 32, 32, 3), target=pb.Target(**{name: TARGETS[name]}))
    result = small.answer(request).result
    assert not result.failures
    assert list(result.maps.shape) == ([1, 2, 32, 32] if name == "top_k" else [1, 32, 32])
    assert result.provenance.target == request.target


def test_every_method_of_the_schema_has_a_class_whose_parameters_are_its_fields() -> None:
    """Messages and methods are converted by these names."""
    assert set(pb.Method.DESCRIPTOR.fields_by_name) == set(CLASSES)
    for field in pb.Method.DESCRIPTOR.fields:
        parameters = {re.sub("_(height|width)$", "", each.name) for each in field.message_type.fields}
        has = {each.name for each in dataclasses.fields(CLASSES[field.name])}
        # Guided backpropagation is a gradient whose options are fixed.
        assert parameters == has or (field.name == "guided_backpropagation" and not parameters)
