"""Targets, models and scores that a server does not have."""

from collections.abc import Iterator

import grpc
import pytest
import sidelight_server
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2
from torch import nn

from support.messages.checked_server import Service, ask, floats, pixels
from support.models import Linear

Status = grpc.StatusCode


@pytest.fixture(scope="module")
def probabilistic(device: str) -> Iterator[Service]:
    """A model that returns probabilities."""
    module = nn.Sequential(Linear(shape=(3, 4, 5)), nn.Softmax(dim=1))
    with (
        sidelight_server.serve(module, output_kind="probabilities", device=device) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield Service.at(channel, ask(floats(2, 3, 4, 5)))


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


def test_an_unknown_model_is_not_found_and_a_similar_name_is_suggested(small: Service) -> None:
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
