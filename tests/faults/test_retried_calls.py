"""Calls beside servers that are absent, full or cut off: the timeout holds, and the error names the cause."""

import asyncio
import contextvars
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import sidelight

from support import ROOT
from support.servers.proxy import proxy
from support.servers.scripted import Ended, Script, answer, mute, nobody, scripted
from support.servers.streams import ONE, Requests, Responses, assert_all_answered, echo, stream


def test_a_stream_uses_all_servers_and_one_for_each_batch() -> None:
    came = {name: threading.Event() for name in "ab"}
    indices = []

    def counting(name: str) -> Script:
        def script(requests: Requests) -> Responses:
            for request in requests:
                came[name].set()
                assert all(each.wait(30) for each in came.values())
                indices.append(int(request.attribute.id))
                yield answer(request)

        return script

    with scripted(counting("a")) as a, scripted(counting("b")) as b:
        assert_all_answered(stream([a, b], [ONE] * 40), 40)
    assert sorted(indices) == list(range(40))


def test_a_stream_continues_after_one_of_two_servers_dies() -> None:
    died = threading.Event()

    def dying(requests: Requests) -> Responses:
        yield answer(next(requests))
        died.set()
        raise Ended(grpc.StatusCode.UNAVAILABLE, "cut")

    with scripted(dying, nobody) as a, scripted(echo) as b:
        assert_all_answered(stream([a, b], [ONE] * 50), 50)
    assert died.is_set()


def test_a_call_goes_to_another_server_where_one_is_absent(address: str) -> None:
    with sidelight.connect([f"unix:{ROOT}/absent", address], connect_timeout=10) as client:
        for _ in range(4):
            assert len(client.attribute(np.zeros((1, 3, 32, 32), np.float32))) == 1
        answers = list(client.stream([np.zeros((1, 3, 32, 32), np.float32)] * 10))
        assert len(answers) == 10


@pytest.mark.parametrize("addresses", [[], ["127.0.0.1:1", "127.0.0.1:1"], ["127.0.0.1:1", "x"], 5], ids=str)
def test_an_invalid_list_of_addresses_is_refused(addresses: object) -> None:
    with pytest.raises(sidelight.InvalidArgument, match="address"):
        sidelight.connect(addresses)


@pytest.mark.parametrize("way", ["attribute", "stream", "aio"])
def test_a_call_waits_for_a_server_no_longer_than_its_timeout(way: str, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/nobody"

    async def asynchronous() -> None:
        async with sidelight.aio.connect(address, connect_timeout=600) as client:
            await client.attribute(ONE, timeout=0.3)

    with sidelight.connect(address, connect_timeout=600) as client:
        calls = {
            "attribute": lambda: client.attribute(ONE, timeout=0.3),
            "stream": lambda: list(client.stream([ONE], timeout=0.3)),
            "aio": lambda: asyncio.run(asynchronous()),
        }
        with pytest.raises(sidelight.Unavailable, match=r"no server answers at .* after 0\.3 s"):
            calls[way]()


def test_a_streams_call_is_made_in_the_callers_context_and_brings_its_metadata() -> None:
    """Tracing finds the caller's span in the context."""
    span: contextvars.ContextVar[str] = contextvars.ContextVar("span", default="none")
    seen: list[tuple[str, object]] = []
    seen_in: list[str] = []  # the span that is current while a batch is read

    def living(requests: Requests) -> Responses:
        yield from map(answer, requests)

    with scripted(living) as address, sidelight.connect(address) as client:
        (connection,) = client._core.pool.connections
        opened = connection.open_stream

        def opening(*arguments: object, **options: object) -> object:
            seen.append((span.get(), options["metadata"]))
            return opened(*arguments, **options)

        connection.open_stream = opening
        span.set("the caller's")
        batches = (seen_in.append(span.get()) or ONE for _ in range(2))
        assert len(list(client.stream(batches, metadata=[("traceparent", "00-1-2-01")]))) == 2
    assert seen_in == ["the caller's"] * 2
    assert seen == [("the caller's", (("traceparent", "00-1-2-01"),))]


# Calls that are cut or refused, and what is tried again.

FULL = (("retry-after-ms", "50"),)


@pytest.mark.parametrize("way", ["attribute", "aio"])
def test_a_call_that_its_caller_did_not_cancel_is_made_again(way: str) -> None:
    n_calls = itertools.count(1)

    def cancelling(requests: Requests) -> Responses:
        next(n_calls)
        raise Ended(grpc.StatusCode.CANCELLED, "too many resets")
        yield

    async def asynchronous(address: str, **options: Any) -> sidelight.Attribution:
        async with sidelight.aio.connect(address, connect_timeout=10, **options) as client:
            return await client.attribute(ONE)

    def synchronous(address: str, **options: Any) -> sidelight.Attribution:
        with sidelight.connect(address, connect_timeout=10, **options) as client:
            return client.attribute(ONE)

    def ask(address: str, **options: Any) -> sidelight.Attribution:
        return asyncio.run(asynchronous(address, **options)) if way == "aio" else synchronous(address, **options)

    with scripted(*[cancelling] * 4, echo) as address:
        assert len(ask(address)) == 1
        assert next(n_calls) == 5
    with scripted(cancelling) as address, pytest.raises(sidelight.exceptions.Cancelled, match="too many resets"):
        ask(address, retry=False)


@pytest.mark.parametrize("retry", [True, False])
def test_a_full_server_is_reported_as_full_within_the_calls_timeout(retry: bool) -> None:
    """A batch that is too large for one message is sent on a stream, which the server does not accept."""

    def full(requests: Requests) -> Responses:
        raise Ended(grpc.StatusCode.RESOURCE_EXHAUSTED, "as many streams as may be", FULL)
        yield

    large = np.zeros((8, 3, 32, 32), np.float32)
    with (
        scripted(full, max_message_bytes=50_000, refused=True) as address,
        sidelight.connect(address, connect_timeout=600, retry=retry) as client,
        pytest.raises(sidelight.ResourceExhausted, match="as many streams as may be"),
    ):
        client.attribute(large, timeout=0.5 if retry else 600)


def test_a_call_that_the_client_cut_is_not_reported_as_cancelled_by_the_application(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sidelight._streaming.scheduling.resend_queue.GRACE_S", 0.1)

    def silent(requests: Requests) -> Responses:
        list(requests)
        yield from ()

    with scripted(silent, mute) as address, sidelight.connect(address, connect_timeout=0.5) as client:
        answers = client.stream(itertools.repeat(ONE), on_error="return", timeout=0.3)
        assert type(next(answers).error) is sidelight.DeadlineExceeded
        with pytest.raises(sidelight.Unavailable) as caught:
            list(answers)
    assert "did not answer within" in caught.value.message
    assert "Locally cancelled" not in caught.value.message


@pytest.mark.serial
def test_the_queries_before_a_call_end_at_its_timeout(address: str) -> None:
    with proxy(address) as network, sidelight.connect(network.address, connect_timeout=10) as client:
        client.info()
        network.stall()
        began_s = time.monotonic()
        with pytest.raises(sidelight.DeadlineExceeded):
            client.attribute(ONE, model="which is asked for", timeout=0.3)
        assert time.monotonic() - began_s < 5  # the query alone may take 10 s
        network.flow()
