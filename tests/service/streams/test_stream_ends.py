"""How streams end: callers that leave or stall, the maximum age, and the shutdown of the server."""

import asyncio
import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from grpc._cython import cygrpc
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc
from sidelight_server.rpc.streaming.stream import Context, Stream

from support.messages.attribution import (
    LARGE,
    assert_explains,
    attribute,
    floats,
    maps_of,
)
from support.messages.conversation import Conversation
from support.models import Linear
from support.servers.counters import count_of
from support.servers.running import TIMEOUT_S, Running, gated, running
from support.waiting import until_no_stream_is_left


def test_a_caller_that_disconnects_frees_rows_and_permits(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device, max_in_flight=4) as (gate, server), Conversation(server.channel) as stream:
        stream.send(*(attribute(str(n), floats(3)) for n in range(6)))  # two more than the number of permits
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


def test_callers_that_disconnect_at_any_time_leave_nothing_behind(
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
def test_a_disconnected_caller_is_not_logged_and_an_internal_error_is(
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
        server.run(asyncio.sleep(0))  # let gRPC's callbacks run
        assert [record.name for record in caplog.records] == ["grpc._cython.cygrpc"] * n_lines


def test_a_caller_that_sends_no_more_still_gets_all_answers(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server), Conversation(server.channel) as stream:
        stream.send(*(attribute(str(n), floats(2, seed=n)) for n in range(5)))
        stream.send(None)
        assert gate.reached.wait(TIMEOUT_S)
        gate.open()
        answers = stream.finish()
        assert {answer.id for answer in answers} == {str(n) for n in range(5)}
        for answer in answers:
            assert_explains(answer, floats(2, seed=int(answer.id)))


def test_waiting_batches_of_a_caller_that_disconnects_are_all_counted(tmp_path: Path, device: str) -> None:
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
        server.until_all_permits_are_back()  # while the caller read nothing
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


def test_at_its_maximum_age_a_stream_answers_what_it_read_and_ends_with_ok(tmp_path: Path, device: str) -> None:
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
        assert asked - answered == 1  # the batch that was not read
        assert answered > 0
        server.until_all_permits_are_back()


def test_batches_read_before_the_maximum_age_are_answered_after_it(tmp_path: Path, device: str) -> None:
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


def test_the_end_of_a_stream_reports_that_its_server_shuts_down(tmp_path: Path, device: str) -> None:
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


def test_a_caller_whose_network_is_dead_is_detected(tmp_path: Path, device: str) -> None:
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
