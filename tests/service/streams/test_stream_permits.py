"""Slots and permits of streams."""

from pathlib import Path

import pytest

from support.messages.attribution import (
    BRIEF,
    DEADLINE_EXCEEDED,
    assert_explains,
    attribute,
    code_of,
    floats,
)
from support.messages.conversation import Conversation
from support.models import Linear
from support.servers.running import TIMEOUT_S, gated, running


def test_time_that_passes_while_waiting_for_a_permit_counts(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device, max_in_flight=1) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(1)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("hasty", floats(3), timeout=BRIEF))
        hasty = stream.receive()
        assert (hasty.id, code_of(hasty)) == ("hasty", DEADLINE_EXCEEDED)
        assert "full" in hasty.failure.message
        gate.open()
        stream.send(attribute("patient", floats(2)))
        assert {answer.id for answer in stream.finish()} == {"running", "patient"}
        server.until_all_permits_are_back()


@pytest.mark.parametrize("limit", ["max_in_flight", "max_stream_in_flight"])
def test_with_one_stream_slot_batches_are_answered_one_after_another(limit: str, tmp_path: Path, device: str) -> None:
    with running(Linear(), tmp_path, device=device, **{limit: 1}) as server, Conversation(server.channel) as stream:
        stream.send(*(attribute(str(n), floats(3, seed=n)) for n in range(20)))
        answers = stream.finish()
        assert [answer.id for answer in answers] == [str(n) for n in range(20)]
        for n, answer in enumerate(answers):
            assert_explains(answer, floats(3, seed=n))
        server.until_all_permits_are_back()


def test_streams_share_the_permits_of_the_server(tmp_path: Path, device: str) -> None:
    with (
        running(Linear(), tmp_path, device=device, max_in_flight=2) as server,
        Conversation(server.channel) as first,
        Conversation(server.channel) as second,
        Conversation(server.channel) as third,
    ):
        for stream in (first, second, third):
            stream.send(*(attribute(str(n), floats(2, seed=n)) for n in range(15)))
        for stream in (first, second, third):
            answers = stream.finish()
            assert sorted(int(answer.id) for answer in answers) == list(range(15))
            for answer in answers:
                assert_explains(answer, floats(2, seed=int(answer.id)))
        server.until_all_permits_are_back()


def test_over_the_permits_reading_pauses(tmp_path: Path, device: str) -> None:
    """What follows a batch that waits for its permit is not read, or its failure would come before the permit."""
    with gated(tmp_path, device=device, max_in_flight=1) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("first", floats(1)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("second", floats(2)), attribute("", floats(1)))
        gate.open()
        answers = stream.finish()
        assert answers[0].id == "first"
        assert sorted(answer.id for answer in answers) == ["", "first", "second"]
