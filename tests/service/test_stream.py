"""The stream: many batches on one connection, answered as they are ready. No fault of one batch ends the stream."""

import asyncio
import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight_server
from google.protobuf.duration_pb2 import Duration
from grpc._cython import cygrpc
from hypothesis import given
from hypothesis import strategies as st
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, tensor_pb2
from sidelight_server.rpc.streaming.stream import Context, Stream

from support.messages.attribution import (
    BRIEF,
    CANCELLED,
    DEADLINE_EXCEEDED,
    DOCUMENTED,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    LARGE,
    RESOURCE_EXHAUSTED,
    ask,
    assert_explains,
    attribute,
    cancel,
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
from support.servers.counters import count_of
from support.servers.running import TIMEOUT_S, Running, gated, running
from support.tolerances import CLOSED_FORM
from support.waiting import until_no_stream_is_left


@pytest.fixture(scope="module")
def linear(device: str) -> Iterator[grpc.Channel]:
    """A server whose maps have a closed form."""
    with (
        sidelight_server.serve(Linear(), class_names=None, device=device) as address,
        grpc.insecure_channel(address) as channel,
    ):
        yield channel


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


def test_question_and_answer_may_take_turns(linear: grpc.Channel) -> None:
    with Conversation(linear) as stream:
        for n in range(5):
            stream.send(attribute("again", floats(2, seed=n)))  # an id is free once it is answered
            assert_explains(stream.receive(), floats(2, seed=n))
        assert stream.finish() == []


def test_a_batch_may_overtake_another(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("slow", floats(2)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("empty", floats(0)))  # which needs no device
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
        stream.send(attribute("running", floats(2)))  # the id is free again
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


def test_cancelling_what_is_not_there_is_passed_over(linear: grpc.Channel) -> None:
    with Conversation(linear) as stream:
        stream.send(cancel("nobody"), cancel(""), attribute("one", floats(1)))
        assert_explains(stream.receive(), floats(1))
        stream.send(cancel("one"), cancel("one"), attribute("two", floats(2)))
        (answer,) = stream.finish()
    assert answer.id == "two"


def test_a_batch_whose_time_is_over_fails_alone(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(1)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("hasty", floats(3), timeout=BRIEF), attribute("patient", floats(2)))
        hasty = stream.receive()
        assert (hasty.id, code_of(hasty)) == ("hasty", DEADLINE_EXCEEDED)
        gate.open()
        assert {answer.id for answer in stream.finish()} == {"running", "patient"}
        assert gate.n_rows == 3


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
def test_what_cannot_be_served_is_refused_and_the_stream_goes_on(
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


@pytest.mark.parametrize("limit", ["max_in_flight", "max_stream_in_flight"])
def test_with_one_place_all_are_answered_one_after_another(limit: str, tmp_path: Path, device: str) -> None:
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


def test_a_caller_who_goes_away_frees_rows_and_permits(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device, max_in_flight=4) as (gate, server), Conversation(server.channel) as stream:
        stream.send(*(attribute(str(n), floats(3)) for n in range(6)))  # two more than there are permits
        assert gate.reached.wait(TIMEOUT_S)
        n_running = gate.n_rows
        stream.leave()
        server.until_all_permits_are_back()
        gate.open()
        with Conversation(server.channel) as other:
            other.send(attribute("other", floats(2)))
            (answer,) = other.finish()
        assert_explains(answer, floats(2))
        assert gate.n_rows == n_running + 2


def test_callers_who_go_away_at_any_moment_leave_nothing_behind(
    tmp_path: Path, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    images = floats(64)
    with running(Linear(), tmp_path, device=device, max_in_flight=8, max_chunk_rows=64) as server:
        for n_received in range(25):
            with Conversation(server.channel) as stream:
                # Answers of 15 kB, more than gRPC takes for a caller who does not read them.
                stream.send(*(attribute(str(n), images, channels=pb.CHANNEL_REDUCTION_NONE) for n in range(40)))
                for _ in range(n_received):
                    stream.receive()
        server.until_all_permits_are_back()
        with Conversation(server.channel) as stream:
            stream.send(*(attribute(str(n), floats(2)) for n in range(10)))
            assert len(stream.finish()) == 10
    # It is no fault. (Older grpcio logs a BlockingIOError where two event loops of one process poll its queue.)
    logged = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [record for record in logged if "PollerCompletionQueue" not in record.getMessage()]


async def _has_gone(context: Context) -> None:
    """Fail as a write does while the caller disconnects: a moment that no test can hit reliably."""
    raise cygrpc.ExecuteBatchError('Failed "execute_batch": (SendInitialMetadataOperation,)')


async def _is_misused(context: Context) -> None:
    """Write twice at the same time, which gRPC rejects."""
    first = asyncio.create_task(context.write(b""))
    await asyncio.sleep(0)
    try:
        await context.write(b"")
    finally:
        await first


@pytest.mark.parametrize(("end", "n_lines"), [(_has_gone, 0), (_is_misused, 1)])
def test_a_caller_who_goes_makes_no_line_and_a_fault_makes_one(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[Context], Awaitable[None]],
    n_lines: int,
) -> None:
    ended = threading.Event()

    async def run(stream: Stream) -> None:
        try:
            await end(stream._context)
        finally:
            ended.set()

    monkeypatch.setattr(Stream, "run", run)
    with running(Linear(), tmp_path, device="cpu") as server, Conversation(server.channel):
        assert ended.wait(TIMEOUT_S)
        server.run(asyncio.sleep(0))  # gRPC has its turn
        assert [record.name for record in caplog.records] == ["grpc._cython.cygrpc"] * n_lines


def test_a_caller_who_sends_no_more_still_gets_all_answers(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(*(attribute(str(n), floats(2, seed=n)) for n in range(5)))
        stream.send(None)
        assert gate.reached.wait(TIMEOUT_S)
        gate.open()
        answers = stream.finish()
        assert {answer.id for answer in answers} == {str(n) for n in range(5)}
        for answer in answers:
            assert_explains(answer, floats(2, seed=int(answer.id)))


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


def test_batches_whose_caller_goes_while_they_wait_are_all_counted(tmp_path: Path, device: str) -> None:
    """One runs, one waits for its slot, and one is read behind that."""
    one_slot = gated(tmp_path, device=device, max_chunk_rows=1, max_stream_in_flight=1)
    with one_slot as (gate, server), Conversation(server.channel) as stream:
        telemetry, have_come = server.server.handler.telemetry, queue.SimpleQueue()
        begin = telemetry.begin
        telemetry.begin = lambda *of, **by: have_come.put(call_record := begin(*of, **by)) or call_record
        stream.send(attribute("running", floats(1)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("waiting", floats(1)), attribute("behind", floats(1)))
        for _ in range(3):
            have_come.get(timeout=TIMEOUT_S)
        stream.leave()
        gate.open()
        server.until_all_permits_are_back()
        until_s = time.monotonic() + TIMEOUT_S
        while count_of(telemetry, "sidelight_requests_total") < 3 and time.monotonic() < until_s:
            server.run(asyncio.sleep(0))
        assert count_of(telemetry, "sidelight_requests_total") == 3


def test_a_stalled_reader_loses_its_stream_and_its_permits(tmp_path: Path, device: str) -> None:
    stalling = running(Linear(), tmp_path, device=device, max_chunk_rows=512, max_in_flight=4, stalled_write_s=0.2)
    with stalling as server, Conversation(server.channel) as stream:
        stream.send(*(attribute(str(n), LARGE, channels=pb.CHANNEL_REDUCTION_NONE) for n in range(60)))
        server.run(until_it_ends(server))
        assert_explains_meanwhile(server)
        server.until_all_permits_are_back()  # while nothing was read
        answers, code, cause = stream.end()
        assert (code, cause) == (grpc.StatusCode.ABORTED, "stalled")
        assert "stalled_write_s" in stream.details
        assert 0 < len(answers) < 60
        assert all(answer.result.final for answer in answers)


def test_a_stalled_reader_holds_no_more_than_its_window(tmp_path: Path, device: str) -> None:
    patient = running(Linear(), tmp_path, device=device, max_chunk_rows=512, max_stream_in_flight=4, stalled_write_s=0)
    with patient as server, Conversation(server.channel) as stream:
        stream.send(*(attribute(str(n), LARGE, channels=pb.CHANNEL_REDUCTION_NONE) for n in range(30)))
        for _ in range(5):
            assert_explains_meanwhile(server)
            assert server.counts().permits <= 4
        assert {answer.id for answer in stream.finish()} == {str(n) for n in range(30)}
        server.until_all_permits_are_back()


def assert_explains_meanwhile(server: Running) -> None:
    with Conversation(server.channel) as other:
        other.send(attribute("other", floats(1)))
        (answer,) = other.finish()
    assert_explains(answer, floats(1))


def test_at_its_greatest_age_a_stream_answers_what_it_read_and_ends_well(tmp_path: Path, device: str) -> None:
    with running(Linear(), tmp_path, device=device, max_stream_age_s=0.3) as server:
        asked, answered = 0, 0
        with Conversation(server.channel) as stream:
            code, rest = None, []
            while code is None:
                stream.send(attribute(str(asked), floats(1)))
                asked += 1
                try:
                    assert stream.receive().id == str(answered)
                    answered += 1
                except StopIteration:
                    rest, code, cause = stream.end()
        assert (rest, code, cause) == ([], grpc.StatusCode.OK, "age")
        assert asked - answered == 1  # which was not read
        assert answered > 0
        server.until_all_permits_are_back()


def test_what_was_read_before_the_greatest_age_is_answered_after_it(tmp_path: Path, device: str) -> None:
    ageing = gated(tmp_path, device=device, max_stream_age_s=0.1, max_stream_in_flight=1)
    with ageing as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(2)), attribute("waiting", floats(1)))
        assert gate.reached.wait(TIMEOUT_S)
        server.run(until_it_ends(server))
        stream.send(attribute("late", floats(3)))
        gate.open()
        answers, code, cause = stream.end()
        assert (code, cause) == (grpc.StatusCode.OK, "age")
        assert "late" not in {answer.id for answer in answers}
        assert_explains(answers[0], floats(2))
        assert gate.n_rows == sum(len(maps_of(answer)) for answer in answers)
        server.until_all_permits_are_back()


async def until_it_ends(server: Running) -> None:
    """Wait until the only stream has stopped reading."""
    async with asyncio.timeout(TIMEOUT_S):
        while not any(stream._end for stream in server.server.calls._streams):  # noqa: ASYNC110  (this loop sets it)
            await asyncio.sleep(0)


def test_a_stream_says_that_its_server_shuts_down(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("running", floats(2)))
        assert gate.reached.wait(TIMEOUT_S)
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(drain_s=TIMEOUT_S), server.loop)
        server.run(until_it_ends(server))
        gate.open()
        answers, code, cause = stream.end()
        assert (code, cause) == (grpc.StatusCode.UNAVAILABLE, "shutdown")
        (answer,) = answers
        assert_explains(answer, floats(2))
        stopping.result(TIMEOUT_S)


class Wire:
    """Forwards a port to a server's socket until it is cut: then what is sent is lost, and no peer is notified."""

    def __init__(self, socket_path: str) -> None:
        self._there = socket_path
        self._is_cut = False
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> str:
        return f"127.0.0.1:{self._listening.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        for each in (self._listening, *self._ends):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        self._is_cut = True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                there = socket.socket(socket.AF_UNIX)
                there.connect(self._there)
                self._ends += [here, there]
                for ends in ((here, there), (there, here)):
                    self._threads.append(threading.Thread(target=self._pass, args=ends))
                    self._threads[-1].start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._is_cut:
                    sink.sendall(data)


def test_a_caller_whose_network_is_dead_is_noticed(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device, keepalive_s=0.3) as (gate, server):
        wire = Wire(f"{tmp_path}/socket")
        with wire as address, grpc.insecure_channel(address) as channel:
            stub = attribution_pb2_grpc.AttributionServiceStub(channel)
            # Without a deadline, which would end it as well.
            call = stub.AttributeStream(iter([attribute("one", floats(1))]))
            assert gate.reached.wait(TIMEOUT_S)
            wire.cut()
            until_no_stream_is_left(server)
            call.cancel()
        gate.open()
        server.until_all_permits_are_back()


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
