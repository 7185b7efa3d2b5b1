"""The stream: many batches on one connection, answered as they are ready. No fault of one batch ends the stream."""

from collections.abc import Iterable
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight_server
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from support.messages.attribution import (
    BRIEF,
    DEADLINE_EXCEEDED,
    DOCUMENTED,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    ask,
    assert_explains,
    attribute,
    code_of,
    floats,
    linear_maps,
    maps_of,
)
from support.messages.conversation import Conversation
from support.messages.strategies import (
    STREAM_REQUESTS,
)
from support.models import Linear, small_cnn
from support.servers.running import TIMEOUT_S, gated, running
from support.tolerances import CLOSED_FORM


def test_every_batch_is_answered_with_its_own_maps(linear: grpc.Channel) -> None:
    batches = {str(n): floats(1 + n % 5, seed=n) for n in range(60)}
    with Conversation(linear) as stream:
        stream.send(*(attribute(id_, images) for id_, images in batches.items()))
        answers = stream.finish()
    assert len(answers) == len(batches)
    assert {answer.id for answer in answers} == batches.keys()
    for answer in answers:
        assert_explains(answer, batches[answer.id])


def test_a_stream_may_stay_silent(linear: grpc.Channel) -> None:
    with Conversation(linear) as stream:
        assert stream.finish() == []


def test_a_caller_may_wait_for_each_answer_before_it_sends_the_next_batch(linear: grpc.Channel) -> None:
    with Conversation(linear) as stream:
        for n in range(5):
            stream.send(attribute("again", floats(2, seed=n)))  # an id may be used again once it is answered
            assert_explains(stream.receive(), floats(2, seed=n))
        assert stream.finish() == []


def test_a_batch_may_overtake_another(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("slow", floats(2)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("empty", floats(0)))  # an empty batch needs no device
        assert stream.receive().id == "empty"
        gate.open()
        (answer,) = stream.finish()
        assert answer.id == "slow"
        assert_explains(answer, floats(2))


BAD = {
    "wrong length": ({"images": tensor_pb2.Images(tensor=tensor_pb2.Tensor(dtype=4, shape=[1, 3, 4, 5]))}, 3),
    "many dimensions": ({"images": tensor_pb2.Images(tensor=tensor_pb2.Tensor(dtype=1, shape=[1] * 65, data=b"0"))}, 3),
    "no images": ({"images": tensor_pb2.Images()}, 3),
    "no target": ({"target": pb.Target()}, 3),
    "no such class": ({"target": pb.Target(index=10)}, 3),
    "no such label": ({"target": pb.Target(label="cat")}, 5),
    "no such model": ({"model": "other"}, 5),
    "no method": ({"method": pb.Method()}, 3),
    "a bad parameter": ({"method": pb.Method(rise=pb.RiseMethod())}, 3),
    "a bad picture": ({"output": pb.Output(rendered=pb.Rendering(alpha=2))}, 3),
    "files for a model without input size": (
        {"images": tensor_pb2.Images(encoded=tensor_pb2.EncodedImages(files=[b""]))},
        9,
    ),
    "a long id": ({"id": "x" * 129}, 3),
    "no time": ({"timeout": Duration()}, 3),
}


@pytest.mark.parametrize(("fields", "code"), BAD.values(), ids=BAD)
def test_a_bad_batch_fails_alone(fields: dict[str, object], code: int, linear: grpc.Channel) -> None:
    bad = pb.AttributeStreamRequest(attribute=ask(floats(1), **({"id": "bad"} | fields)))
    with Conversation(linear) as stream:
        stream.send(attribute("before", floats(2)), bad, attribute("after", floats(3)))
        answers = {answer.id: answer for answer in (stream.receive() for _ in range(3))}
        assert code_of(answers.pop(bad.attribute.id)) == code
        assert answers.keys() == {"before", "after"}
        assert_explains(answers["before"], floats(2))
        assert_explains(answers["after"], floats(3))

        stream.send(bad, attribute("again", floats(4)))
        answers = {answer.id: answer for answer in stream.finish()}
        assert code_of(answers[bad.attribute.id]) == code
        assert_explains(answers["again"], floats(4))


def test_an_example_that_fails_alone_is_no_failure_of_its_batch(linear: grpc.Channel) -> None:
    images = floats(3)
    images[1, 0, 0, 0] = np.nan
    with Conversation(linear) as stream:
        stream.send(attribute("mixed", images))
        (answer,) = stream.finish()
    maps = maps_of(answer)
    assert [failure.example for failure in answer.result.failures] == [1]
    assert np.isnan(maps[1]).all()
    np.testing.assert_allclose(maps[[0, 2]], linear_maps(images[[0, 2]]), **CLOSED_FORM)


def test_a_batch_past_its_timeout_fails_alone(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(1)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("hasty", floats(3), timeout=BRIEF), attribute("patient", floats(2)))
        hasty = stream.receive()
        assert (hasty.id, code_of(hasty)) == ("hasty", DEADLINE_EXCEEDED)
        gate.open()
        assert {answer.id for answer in stream.finish()} == {"running", "patient"}
        assert gate.n_rows == 3


def test_an_id_that_is_not_answered_yet_is_refused(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("twice", floats(1)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("twice", floats(2)))
        refused = stream.receive()
        assert (refused.id, code_of(refused)) == ("twice", INVALID_ARGUMENT)
        assert '"twice"' in refused.failure.message
        gate.open()
        (answer,) = stream.finish()
        assert_explains(answer, floats(1))


REFUSED = {
    "an empty id": (attribute("", floats(1)), "", INVALID_ARGUMENT, "id: empty"),
    "nothing": (pb.AttributeStreamRequest(), "", INVALID_ARGUMENT, "attribute, cancel or register_region"),
    "something newer": (
        pb.AttributeStreamRequest.FromString(b"\x9a\x06\x00"),
        "",
        INVALID_ARGUMENT,
        "attribute, cancel or register_region",
    ),
    "a region": (
        pb.AttributeStreamRequest(register_region=pb.RegisterRegionRequest(id="r", region="x", size_bytes=8)),
        "r",
        FAILED_PRECONDITION,
        "shared_memory",
    ),
}


@pytest.mark.parametrize(("request_", "id_", "code", "fragment"), REFUSED.values(), ids=REFUSED)
def test_a_batch_that_cannot_be_served_is_refused_and_the_stream_goes_on(
    request_: pb.AttributeStreamRequest, id_: str, code: int, fragment: str, linear: grpc.Channel
) -> None:
    with Conversation(linear) as stream:
        stream.send(request_)
        refused = stream.receive()
        assert (refused.id, code_of(refused)) == (id_, code)
        assert fragment in refused.failure.message
        stream.send(attribute("next", floats(2)))
        (answer,) = stream.finish()
    assert_explains(answer, floats(2))


def test_a_batch_that_can_never_fit_fails_and_the_stream_goes_on(tmp_path: Path, device: str) -> None:
    with (
        running(Linear(), tmp_path, device=device, max_in_flight_bytes=8192) as server,
        Conversation(server.channel) as stream,
    ):
        stream.send(attribute("large", floats(30)), attribute("small", floats(1)))
        answers = {answer.id: answer for answer in stream.finish()}
        assert code_of(answers["large"]) == RESOURCE_EXHAUSTED
        assert not answers["large"].failure.HasField("retry_delay")
        assert_explains(answers["small"], floats(1))


def test_an_answer_that_only_its_envelope_makes_too_long_fails_alone(device: str) -> None:
    images = np.zeros((1, 32, 32, 3), np.uint8)
    long_id = "x" * 128
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32))

    def run(**settings: object) -> list[pb.AttributeStreamResponse]:
        with (
            sidelight_server.serve(spec, device=device, **settings) as address,
            grpc.insecure_channel(address) as channel,
            Conversation(channel) as stream,
        ):
            stream.send(attribute(long_id, images), attribute("short", np.zeros((0, 32, 32, 3), np.uint8)))
            return stream.finish()

    (whole,) = (answer for answer in run() if answer.id == long_id)
    # The answer's times take a few bytes more or less; the id alone takes 128 more.
    limited = {answer.id: answer for answer in run(max_message_bytes=whole.result.ByteSize() + 32)}
    assert code_of(limited[long_id]) == RESOURCE_EXHAUSTED
    assert limited["short"].result.final


def answered(requests: Iterable[pb.AttributeStreamRequest]) -> int:
    return sum(each.WhichOneof("request") != "cancel" for each in requests)


@given(requests=st.lists(STREAM_REQUESTS, min_size=1, max_size=8))
def test_nothing_that_is_sent_ends_a_stream(address: str, requests: list[pb.AttributeStreamRequest]) -> None:
    last = attribute("the last", np.zeros((1, 32, 32, 3), np.uint8))
    with grpc.insecure_channel(address) as channel, Conversation(channel) as stream:
        stream.send(*requests, last)
        answers = stream.finish()
    assert len(answers) == answered(requests) + 1
    for answer in answers:
        if answer.WhichOneof("outcome") == "failure":
            assert code_of(answer) in DOCUMENTED, answer.failure
    assert [answer.result.final for answer in answers if answer.id == "the last"] == [True]
