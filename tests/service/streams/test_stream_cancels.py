"""Batches of a stream that are cancelled while they wait or run."""

from pathlib import Path

import grpc
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc

from support.messages.attribution import (
    CANCELLED,
    assert_explains,
    attribute,
    cancel,
    code_of,
    floats,
)
from support.messages.conversation import Conversation
from support.servers.running import TIMEOUT_S, gated


def test_a_cancelled_batch_is_answered_cancelled_and_its_rows_never_run(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(1)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("waiting", floats(5)), attribute("wanted", floats(2)), cancel("waiting"))
        cancelled = stream.receive()
        assert (cancelled.id, code_of(cancelled)) == ("waiting", CANCELLED)

        gate.open()
        answers = {answer.id: answer for answer in stream.finish()}
        assert answers.keys() == {"running", "wanted"}
        assert_explains(answers["running"], floats(1))
        assert_explains(answers["wanted"], floats(2))
        assert gate.n_rows == 3
        server.until_all_permits_are_back()


def test_a_batch_whose_rows_are_running_can_be_cancelled(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device, max_chunk_rows=1) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(4)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(cancel("running"))
        cancelled = stream.receive()
        assert (cancelled.id, code_of(cancelled)) == ("running", CANCELLED)
        stream.send(attribute("running", floats(2)))  # the id may be used again
        gate.open()
        (answer,) = stream.finish()
        assert_explains(answer, floats(2))
        assert gate.n_rows == 3


def test_a_cancel_is_read_while_all_slots_are_taken_and_the_server_reports_how_soon_it_stopped(
    tmp_path: Path, device: str
) -> None:
    one_slot = gated(tmp_path, device=device, max_chunk_rows=1, max_stream_in_flight=1)
    with one_slot as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(4)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(cancel("running"))
        assert (answer := stream.receive()).id == "running"
        assert code_of(answer) == CANCELLED
        gate.open()
        stream.send(attribute("next", floats(1)))
        assert_explains(stream.receive(), floats(1))
        info = attribution_pb2_grpc.AttributionServiceStub(server.channel).GetServerInfo(
            pb.GetServerInfoRequest(), timeout=TIMEOUT_S
        )
    assert info.cancellations.count == 1
    assert info.cancellations.mean == info.cancellations.longest
    assert info.cancellations.mean.ToNanoseconds() > 0


def test_cancelling_an_unknown_id_is_ignored(linear: grpc.Channel) -> None:
    with Conversation(linear) as stream:
        stream.send(cancel("nobody"), cancel(""), attribute("one", floats(1)))
        assert_explains(stream.receive(), floats(1))
        stream.send(cancel("one"), cancel("one"), attribute("two", floats(2)))
        (answer,) = stream.finish()
    assert answer.id == "two"


def test_a_cancel_is_read_behind_a_batch_that_waits(tmp_path: Path, device: str) -> None:
    one_slot = gated(tmp_path, device=device, max_chunk_rows=1, max_stream_in_flight=1)
    with one_slot as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(4)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("waiting", floats(1)), cancel("waiting"))
        cancelled = stream.receive()
        assert (cancelled.id, code_of(cancelled)) == ("waiting", CANCELLED)
        stream.send(attribute("waiting", floats(1)), cancel("running"))
        cancelled = stream.receive()
        assert (cancelled.id, code_of(cancelled)) == ("running", CANCELLED)
        gate.open()
        (answer,) = stream.finish()
        assert_explains(answer, floats(1))
        assert gate.n_rows == 2
        server.until_all_permits_are_back()
