"""Unary calls that wait for a permit: for how long, how many, and what remains of one that is cancelled meanwhile."""

import asyncio
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from sidelight.v1 import attribution_pb2 as pb
from sidelight_server.rpc import request_handler
from sidelight_server.rpc.limits import receive_limit

from support.certificates import secret
from support.messages.attribution import ask, floats
from support.servers.running import TIMEOUT_S, Running, gated
from support.waiting import until

Status = grpc.StatusCode
MEBIBYTE = 2**20
FLOOD, GOOD = (("authorization", "Bearer flood"),), (("authorization", "Bearer good"),)


@pytest.fixture
def long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_handler, "UNARY_WAIT_S", TIMEOUT_S)


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_handler, "UNARY_WAIT_S", 0.05)


def fill(server: Running) -> grpc.Future:
    """Take the server's only permit."""
    call = server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S, metadata=GOOD)
    until(server, lambda: server.counts().permits == 1)
    return call


@pytest.mark.usefixtures("long_wait")
@pytest.mark.parametrize("limit_bytes", [None, 32_768], ids=["default limits", "limits below what a wait counts as"])
def test_a_waiting_call_gets_the_next_permit(tmp_path: Path, device: str, limit_bytes: int | None) -> None:
    sizes = {"max_in_flight_bytes": limit_bytes, "max_message_bytes": limit_bytes} if limit_bytes else {}
    with gated(tmp_path, device=device, max_in_flight=1, **sizes) as (gate, server):
        first = fill(server)
        second = server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S)
        until(server, lambda: server.counts().waiting == 1)
        gate.open()
        assert [len(call.result().result.examples) for call in (first, second)] == [1, 1]


@pytest.mark.usefixtures("short_wait")
def test_a_call_that_has_waited_is_refused_with_a_retry_delay(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device, max_in_flight=1) as (gate, server):
        first = fill(server)
        refused = server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S)
        assert refused.code() is Status.RESOURCE_EXHAUSTED
        assert "max_in_flight 1" in refused.details()
        assert "retry-after-ms" in dict(refused.trailing_metadata())
        assert (server.counts().permits, server.counts().waiting) == (1, 0)
        gate.open()
        assert len(first.result().result.examples) == 1


@pytest.mark.usefixtures("long_wait")
@pytest.mark.parametrize("of", ["message", "call"])
def test_a_deadline_that_passes_while_a_call_waits_ends_it(tmp_path: Path, device: str, of: str) -> None:
    timeout = Duration(nanos=50_000_000)
    with gated(tmp_path, device=device, max_in_flight=1) as (gate, server):
        first = fill(server)
        if of == "message":
            late = server.stub.Attribute.future(ask(floats(1), timeout=timeout), timeout=TIMEOUT_S)
        else:
            late = server.stub.Attribute.future(ask(floats(1)), timeout=timeout.nanos / 1e9)
        assert late.code() is Status.DEADLINE_EXCEEDED
        until(server, lambda: server.counts().waiting == 0)
        gate.open()
        assert len(first.result().result.examples) == 1
        until(server, lambda: server.counts().permits == 0)


@pytest.mark.usefixtures("long_wait")
def test_a_call_that_waits_when_the_server_stops_is_unavailable(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device, max_in_flight=1) as (gate, server):
        running = fill(server)
        waiting = server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S)
        until(server, lambda: server.counts().waiting == 1)
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(drain_s=0.1), server.loop)
        assert [call.code() for call in (running, waiting)] == [Status.UNAVAILABLE] * 2
        gate.open()
        stopping.result(TIMEOUT_S)


@pytest.mark.usefixtures("long_wait")
def test_unary_calls_that_wait_for_a_permit_are_bounded_together(tmp_path: Path, device: str) -> None:
    n_waiting = 16 * 3 // 4  # of 64 KiB each in a quarter of 4 MiB, of which one caller has three quarters
    sizes = {"max_in_flight_bytes": 4 * MEBIBYTE, "max_message_bytes": MEBIBYTE}
    with gated(tmp_path, device=device, max_in_flight=1, **sizes) as (gate, server):
        calls = [server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S) for _ in range(20)]
        until(server, lambda: sum(call.done() for call in calls) == 20 - 1 - n_waiting)
        assert (server.counts().permits, server.counts().waiting) == (1, n_waiting)
        refused = [call for call in calls if call.done()]
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all("retry-after-ms" in dict(call.trailing_metadata()) for call in refused)
        gate.open()
        assert all(len(call.result().result.examples) == 1 for call in calls if call not in refused)
        until(server, lambda: server.counts().permits == 0)


@pytest.mark.usefixtures("short_wait")
@pytest.mark.parametrize("is_stream", [False, True], ids=["unary", "stream"])
def test_large_messages_whose_calls_are_cancelled_while_they_wait_are_read_at_a_limited_rate(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    """Otherwise a caller could keep the event loop busy: gRPC joins the parts of each message there."""
    large = ask(np.zeros((400, 3, 30, 30), np.float32), id="large")
    monkeypatch.setattr(receive_limit, "REFUSED_BYTES_PER_S", receive_limit.LARGE_BYTES / TIMEOUT_S)
    tokens = secret(tmp_path / "tokens", "flood\ngood\n")
    with gated(tmp_path, device=device, max_in_flight=1, tokens=tokens) as (gate, server):
        first = fill(server)
        if is_stream:
            requests = iter([pb.AttributeStreamRequest(attribute=large)])
            cancelled = server.stub.AttributeStream(requests, timeout=TIMEOUT_S, metadata=FLOOD)
        else:
            monkeypatch.setattr(request_handler, "UNARY_WAIT_S", TIMEOUT_S)
            cancelled = server.stub.Attribute.future(large, timeout=TIMEOUT_S, metadata=FLOOD)
        until(server, lambda: server.counts().waiting == 1)
        cancelled.cancel()
        until(server, lambda: server.counts().waiting == 0)
        monkeypatch.setattr(request_handler, "UNARY_WAIT_S", 0.05)
        slowed = server.stub.Attribute.future(large, timeout=TIMEOUT_S, metadata=FLOOD)
        assert server.stub.Attribute.future(large, metadata=GOOD).code() is Status.RESOURCE_EXHAUSTED
        assert not slowed.done()
        slowed.cancel()
        gate.open()
        assert len(first.result().result.examples) == 1
