"""Hostile callers: the resources that they can use are bounded, and a good caller is served at the same time."""

import contextlib
import functools
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.app.channel_options import MAX_CONNECTION_CALLS
from sidelight_server.app.health.health import MAX_PEER_WATCHES
from sidelight_server.rpc import interceptors, request_handler
from sidelight_server.rpc.limits import receive_limit
from sidelight_server.rpc.streaming import stream
from torch import Tensor, nn

from benchmarks.support.http2_caller import ATTRIBUTE, CHECK, INFO, STREAM, WATCH, Caller, framed
from support.certificates import secret
from support.engines import tried
from support.messages.attribution import LARGE, ask, attribute, floats
from support.messages.conversation import Conversation
from support.models import Linear
from support.models.gate import Gate
from support.servers.counters import count_of
from support.servers.processes import process
from support.servers.running import TIMEOUT_S, Running, gated, running, serving
from support.waiting import counts, leaving_nothing, until

CANCELLED, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, ABORTED = 1, 4, 8, 10
MEBIBYTE = 2**20
FLOOD, GOOD = (("authorization", "Bearer flood"),), (("authorization", "Bearer good"),)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return secret(tmp_path / "tokens", "flood\ngood\n")


def address(server: Running) -> str:
    return server.server.addresses[0]


def n_held(server: Running) -> int:
    return server.counts().permits


def test_a_connection_has_a_limited_number_of_calls(tmp_path: Path, device: str) -> None:
    with running(Linear(), tmp_path, device=device) as server, Caller(address(server)) as caller:
        assert caller.room == MAX_CONNECTION_CALLS


def test_calls_that_are_reset_at_once_cancel_no_other_calls(tmp_path: Path, device: str) -> None:
    message, is_over = ask(floats(1)).SerializeToString(), threading.Event()

    def flood(to: str) -> None:
        while not is_over.is_set():
            with Caller(to) as caller:
                while not (caller.is_closed or is_over.is_set()):
                    caller.begin_and_reset(ATTRIBUTE, message, 50)
                    caller.look()

    with running(Linear(), tmp_path, device=device) as server, leaving_nothing(server):
        flooding = threading.Thread(target=flood, args=(address(server),))
        flooding.start()
        try:
            answers = [server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S) for _ in range(30)]
        finally:
            is_over.set()
            flooding.join()
        assert all(len(answer.result.examples) == 1 for answer in answers)


def test_watches_of_one_host_are_bounded_over_all_its_connections(tmp_path: Path, device: str) -> None:
    message = health_pb2.HealthCheckRequest().SerializeToString()
    with running(Linear(), tmp_path, device=device) as server, leaving_nothing(server):  # noqa: SIM117
        with Caller(address(server)) as first, Caller(address(server)) as second:
            half = [first.ask(WATCH, message) for _ in range(MAX_PEER_WATCHES // 2)]
            first.until(lambda: all(first.calls[call].data for call in half))
            more = [second.ask(WATCH, message) for _ in range(MAX_PEER_WATCHES)]
            refused = more[MAX_PEER_WATCHES // 2 :]
            second.until(lambda: all(call.is_over or call.data for call in second.calls.values()))
            assert [call for call in more if second.calls[call].status == RESOURCE_EXHAUSTED] == refused
            first.reset(half[0])
            until(server, lambda: server.counts().watches == MAX_PEER_WATCHES - 1)
            again = second.ask(WATCH, message)
            second.until(lambda: bool(second.calls[again].data))


def test_messages_that_are_never_finished_take_little_memory_and_no_time_of_others(tmp_path: Path) -> None:
    """Twelve of 62 MiB to each call, which would be 1.5 GiB; without a token, where health needs none."""
    n, size = 12, 62 * MEBIBYTE
    to = f"unix:{tmp_path}/socket"
    good = ask(floats(1, shape=(3, 16, 16)))
    with process("small", to) as served, grpc.insecure_channel(to) as channel, Caller(to) as caller:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        stub.Attribute(good, timeout=TIMEOUT_S)
        before = psutil.Process(served.pid).memory_info().rss
        piece = bytes(MEBIBYTE)
        for path in (CHECK, ATTRIBUTE):
            for _ in range(n):
                call = caller.begin(path)
                caller.send(call, framed(b"", n_bytes=size))
                while caller.calls[call].status is None and caller.calls[call].n_sent < size:
                    if caller.send(call, piece, patience_s=0.3) < len(piece):
                        break
            assert len(stub.Attribute(good, timeout=TIMEOUT_S).result.examples) == 1
        # Of each caller six may be slow to arrive.
        assert psutil.Process(served.pid).memory_info().rss - before < 10 * size
        assert sum(call.status is None for call in caller.calls.values() if call.path == ATTRIBUTE) <= 6


def test_at_most_64_kib_of_an_unread_message_are_received(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "SLOTS", 1)
    monkeypatch.setattr(receive_limit, "QUICK_S", 60.0)
    with running(Linear(), tmp_path, device=device) as server, Caller(address(server)) as caller:
        first = caller.begin(ATTRIBUTE)
        assert caller.send(first, framed(b"", n_bytes=4 * MEBIBYTE) + bytes(2 * MEBIBYTE)) > 2 * MEBIBYTE
        for _ in range(5):
            waiting = caller.begin(ATTRIBUTE)
            assert caller.send(waiting, framed(bytes(MEBIBYTE)), patience_s=0.3) <= 65_535
        assert server.counts().arriving == 1


def test_a_message_that_does_not_arrive_in_time_frees_its_slot(tmp_path: Path, device: str) -> None:
    brief = running(Linear(), tmp_path, device=device, max_arrival_s=0.2)
    with brief as server, leaving_nothing(server), Caller(address(server)) as caller:
        calls = [caller.begin(path) for path in (ATTRIBUTE, CHECK, WATCH)]
        for call in calls:
            caller.send(call, framed(bytes(10), n_bytes=1000))
        assert [caller.result(call).status for call in calls] == [DEADLINE_EXCEEDED] * 3
        until(server, lambda: server.counts().arriving == 0)


def test_a_caller_whose_large_messages_are_refused_has_the_next_ones_read_at_a_limited_rate(
    tmp_path: Path, device: str, tokens: Path
) -> None:
    refused = pb.AttributeRequest(model="x" * 8 * MEBIBYTE)
    n_calls = 8
    with running(Linear(), tmp_path, device=device, tokens=tokens) as server:
        attribute = server.stub.Attribute
        with pytest.raises(grpc.RpcError, match="images: none"):
            attribute(refused, timeout=TIMEOUT_S, metadata=FLOOD)
        began_s = time.monotonic()
        calls = [attribute.future(refused, timeout=TIMEOUT_S, metadata=FLOOD) for _ in range(n_calls)]
        attribute(ask(floats(1)), timeout=TIMEOUT_S, metadata=GOOD)
        assert not all(call.done() for call in calls), "a good caller waits for the refused messages of another one"
        assert {call.code() for call in calls} == {grpc.StatusCode.INVALID_ARGUMENT}
        # One may be read while the one before it is refused.
        assert time.monotonic() - began_s >= (n_calls - 2) * refused.ByteSize() / receive_limit.REFUSED_BYTES_PER_S


def test_refused_messages_that_waited_for_a_slot_are_read_at_a_limited_rate_too(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interceptors, "SLOTS", 1)
    refused = pb.AttributeRequest(model="x" * 8 * MEBIBYTE)
    n_calls = 8
    with running(Linear(), tmp_path, device=device) as server:
        began_s = time.monotonic()
        calls = [server.stub.Attribute.future(refused, timeout=TIMEOUT_S) for _ in range(n_calls)]
        assert {call.code() for call in calls} == {grpc.StatusCode.INVALID_ARGUMENT}
        # The first is read at once. One may be read while the one before it is refused.
        assert time.monotonic() - began_s >= (n_calls - 2) * refused.ByteSize() / receive_limit.REFUSED_BYTES_PER_S


@pytest.mark.parametrize("path", [CHECK, WATCH, INFO])
def test_a_call_of_small_messages_refuses_a_large_one(path: str, tmp_path: Path, device: str) -> None:
    with running(Linear(), tmp_path, device=device) as server, Caller(address(server)) as caller:
        refused = caller.result(caller.ask(path, bytes(100_000)))
        assert refused.status == RESOURCE_EXHAUSTED
        assert "100000 bytes" in refused.trailers["grpc-message"]


def test_unread_answers_release_their_permits_and_their_calls_are_reset(
    tmp_path: Path, device: str, tokens: Path
) -> None:
    message = ask(floats(1)).SerializeToString()
    stalling = running(Linear(), tmp_path, device=device, tokens=tokens, stalled_write_s=0.5)
    with stalling as server, contextlib.ExitStack() as stack:
        callers = [stack.enter_context(Caller(address(server), window=0)) for _ in range(3)]
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S, metadata=GOOD)
        before = counts(server)
        calls = [(caller, caller.ask(ATTRIBUTE, message, *FLOOD)) for caller in callers for _ in range(85)]
        assert server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S, metadata=GOOD)
        answered = functools.partial(count_of, server.server.handler.telemetry, "sidelight_requests_total")
        until(server, lambda: answered() == len(calls) + 2)
        # gRPC keeps the call that came last until another comes.
        assert server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S, metadata=GOOD)
        for caller, call in calls:
            ended = caller.result(call)
            assert ended.status == RESOURCE_EXHAUSTED or (ended.status == CANCELLED and not ended.data)
        until(server, lambda: n_held(server) == 0 and not counts(server).exceeds(before))
        assert answered(call="Attribute", model="model", method="gradient", code="ABORTED") > 100


def test_a_reader_who_takes_each_answer_slowly_loses_its_stream(tmp_path: Path, device: str) -> None:
    """Each takes less than `stalled_write_s`, but there are eight of them."""
    requests = [attribute(str(n), LARGE, channels=pb.CHANNEL_REDUCTION_NONE) for n in range(8)]
    patient = running(Linear(), tmp_path, device=device, max_chunk_rows=512, stalled_write_s=1.5)
    with patient as server, leaving_nothing(server), Caller(address(server), window=0) as caller:
        call = caller.begin(STREAM)
        content = b"".join(framed(each.SerializeToString()) for each in requests)
        assert caller.send(call, content) == len(content)
        while not caller.calls[call].is_over:
            caller.take(call, 2_000)
            caller.look(0.01)
        assert (caller.calls[call].status, caller.calls[call].trailers["sidelight-end"]) == (ABORTED, "stalled")


def test_a_stream_whose_caller_never_reads_again_is_reset(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STALLED_STATUS_S", 0.2)
    requests = [attribute(str(n), LARGE, channels=pb.CHANNEL_REDUCTION_NONE) for n in range(4)]
    stalling = running(Linear(), tmp_path, device=device, max_chunk_rows=512, stalled_write_s=0.3)
    with stalling as server, leaving_nothing(server), Caller(address(server), window=0) as caller:
        call = caller.begin(STREAM)
        caller.send(call, b"".join(framed(each.SerializeToString()) for each in requests))
        until(server, lambda: not server.counts().streams)
        # gRPC keeps the call that came last until another comes.
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
        assert caller.result(call).status == CANCELLED
        assert not caller.calls[call].data


def test_small_calls_pass_a_large_batch_that_waits(tmp_path: Path, device: str) -> None:
    """Of the same caller, who holds most of the bytes: over UNIX sockets all callers are one."""
    large = floats(2000)
    with (
        gated(tmp_path, device=device, max_in_flight_bytes=16 * MEBIBYTE) as (gate, server),
        Conversation(server.channel) as stream,
    ):
        stream.send(attribute("runs", large), attribute("waits", large))
        assert gate.reached.wait(TIMEOUT_S)
        until(server, lambda: bool(server.counts().waiting))
        small = [server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S) for _ in range(10)]
        until(server, lambda: n_held(server) == 1 + len(small))
        gate.open()
        assert all(len(each.result().result.examples) == 1 for each in small)
        assert len(stream.finish()) == 2
        server.until_all_permits_are_back()


def test_permits_are_left_for_a_caller_beside_one_who_takes_all_it_can(
    tmp_path: Path, device: str, tokens: Path
) -> None:
    message = ask(floats(1)).SerializeToString()
    with gated(tmp_path, device=device, max_in_flight=32, tokens=tokens) as (gate, server):
        with Caller(address(server)) as caller:
            calls = [caller.ask(ATTRIBUTE, message, *FLOOD) for _ in range(MAX_CONNECTION_CALLS)]
            # 24 of 32, which leave a third of themselves free, and 2 small ones of the reserve.
            caller.until(lambda: sum(caller.calls[call].is_over for call in calls) == len(calls) - 26)
            assert {call.status for call in caller.calls.values() if call.is_over} == {RESOURCE_EXHAUSTED}
            good = [server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S, metadata=GOOD) for _ in range(6)]
            until(server, lambda: n_held(server) == 26 + 6)
            gate.open()
            assert all(len(each.result().result.examples) == 1 for each in good)
            caller.until(lambda: all(call.is_over for call in caller.calls.values()))
        server.until_all_permits_are_back()


def test_rows_of_one_caller_are_bounded(tmp_path: Path, device: str, tokens: Path) -> None:
    many = pb.Method(smoothgrad=pb.SmoothGradMethod(samples=99))
    with gated(tmp_path, device=device, max_caller_rows=500, tokens=tokens) as (gate, server):
        calls = [
            server.stub.Attribute.future(ask(floats(1), method=many), timeout=TIMEOUT_S, metadata=FLOOD)
            for _ in range(5)
        ]
        until(server, lambda: n_held(server) == 5)
        with pytest.raises(grpc.RpcError, match="max_caller_rows 500") as caught:
            server.stub.Attribute(ask(floats(1), method=many), timeout=TIMEOUT_S, metadata=FLOOD)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        good = server.stub.Attribute.future(ask(floats(5), method=many), timeout=TIMEOUT_S, metadata=GOOD)
        until(server, lambda: n_held(server) == 6)
        gate.open()
        assert all(each.result() for each in (*calls, good))


class Watched(nn.Module):
    """A model that notes, while it is gated, in which of its chunks a marked example was."""

    MARK = 100.0

    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.linear = Linear()
        self.has_mark: list[bool] = []

    def __deepcopy__(self, memo: dict[int, object]) -> "Watched":
        copied = Watched()
        copied.gate, copied.has_mark = self.gate, self.has_mark
        return copied

    def forward(self, x: Tensor) -> Tensor:
        self.gate.wait(len(x))
        self.has_mark.append(bool((x[:, 0, 0, 0] == self.MARK).any()))
        return self.linear(x)


def test_a_good_caller_beside_300_calls_of_10_000_rows_waits_for_two_chunks(
    tmp_path: Path, device: str, tokens: Path
) -> None:
    """The running one, and possibly one more of another kind: rows without a gradient."""
    flood = ask(floats(1), method=pb.Method(smoothgrad=pb.SmoothGradMethod(samples=9_999))).SerializeToString()
    marked = floats(1)
    marked[0, 0, 0, 0] = Watched.MARK
    module = Watched()
    engine = tried(Engine([ModelSpec(module)], Settings(device=device, tokens=tokens)), torch.zeros(1, 3, 4, 5))
    with serving(engine, f"unix:{tmp_path}/socket") as server, contextlib.ExitStack() as stack:
        callers = [stack.enter_context(Caller(address(server))) for _ in range(3)]
        for caller in callers:
            for _ in range(MAX_CONNECTION_CALLS):
                caller.ask(ATTRIBUTE, flood, *FLOOD)
        until(server, lambda: n_held(server) == 100)  # of a million rows
        until(server, lambda: sum(caller.n_over() for caller in callers) == 200)
        for _ in range(5):
            module.gate.shut()
            assert module.gate.reached.wait(TIMEOUT_S)
            good = server.stub.Attribute.future(ask(marked), timeout=TIMEOUT_S, metadata=GOOD)
            until(server, lambda: engine.n_unanswered == 101)
            module.has_mark.clear()
            module.gate.open()
            assert len(good.result().result.examples) == 1
            assert module.has_mark.index(True) <= 2
        for caller in callers:
            caller.close()
        until(server, lambda: n_held(server) == 0 and engine.n_unanswered == 0)


def test_messages_of_streams_that_wait_for_a_permit_are_bounded_together(tmp_path: Path, device: str) -> None:
    images = np.zeros((400, 3, 4, 5), np.float32)  # 96 kB
    limit = 4 * MEBIBYTE
    sizes = {"max_in_flight_bytes": 4 * limit, "max_message_bytes": limit}
    with gated(tmp_path, device=device, max_in_flight=1, **sizes) as (gate, server):
        waiting = server.server.handler._waiting
        running = server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S)
        until(server, lambda: n_held(server) == 1)
        with contextlib.ExitStack() as stack:
            for _ in range(40):  # two messages of each are read, 7.7 MB
                talk = stack.enter_context(Conversation(server.channel))
                talk.send(attribute("one", images), attribute("two", images))
            until(server, lambda: waiting.n_bytes > 0.7 * limit)
            late = stack.enter_context(Conversation(server.channel))
            late.send(attribute("one", images))
            refused = late.receive().failure
            assert refused.code == RESOURCE_EXHAUSTED
            assert refused.HasField("retry_delay")
            assert waiting.n_bytes <= 0.75 * limit  # one caller's share
        until(server, lambda: waiting.n_bytes == 0)
        gate.open()
        running.result(TIMEOUT_S)


def test_a_unary_call_waits_in_turn_beside_the_batches_of_another_callers_streams(
    tmp_path: Path, device: str, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_handler, "UNARY_WAIT_S", TIMEOUT_S)
    marked = floats(1)
    marked[0, 0, 0, 0] = Watched.MARK
    module = Watched()
    engine = tried(
        Engine([ModelSpec(module)], Settings(device=device, tokens=tokens, max_in_flight=1)), torch.zeros(1, 3, 4, 5)
    )
    module.gate.shut()
    with serving(engine, f"unix:{tmp_path}/socket") as server, contextlib.ExitStack() as stack:
        stack.callback(module.gate.open)
        two = [attribute("one", floats(1)), attribute("two", floats(1))]
        streams = [
            server.stub.AttributeStream(iter(two), timeout=TIMEOUT_S, metadata=FLOOD)  # the next wait for the first one
            for _ in range(10)
        ]
        until(server, lambda: n_held(server) == 1 and server.counts().waiting == 10)
        good = server.stub.Attribute.future(ask(marked), timeout=TIMEOUT_S, metadata=GOOD)
        until(server, lambda: server.counts().waiting == 11)
        module.has_mark.clear()
        module.gate.open()
        assert len(good.result().result.examples) == 1
        assert module.has_mark.index(True) <= 2  # after the batch that ran, and one more of the streams
        assert [len(list(stream)) for stream in streams] == [2] * 10
