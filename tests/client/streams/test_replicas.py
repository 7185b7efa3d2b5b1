"""Several servers behind one client: found by DNS, drained when they leave, the least loaded first, and hedging."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import sidelight
import sidelight_server
from sidelight._transport import resolver

from support.models import small_cnn
from support.models.gate import Gate, Gated

NAME = "sidelight-replicas"
WITHIN_S = 30.0
BATCHES = [np.random.default_rng(i).normal(size=(2, 3, 32, 32)).astype(np.float32) for i in range(8)]


def until(is_so: Callable[[], object], what: str) -> None:
    ends_s = time.monotonic() + WITHIN_S
    while not is_so():
        assert time.monotonic() < ends_s, what
        threading.Event().wait(0.01)


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that the name servers know for `NAME`: a list that the test changes."""
    hosts: list[str] = []
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, *args: object, **kwargs: object) -> list[tuple[object, ...]]:
        if host != NAME:
            return look_up(host, port, *args, **kwargs)
        if not hosts:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [answer for each in hosts for answer in look_up(each, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(resolver, "REFRESH_S", 0.05)
    return hosts


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def replica(address: str | None = None) -> sidelight_server.EmbeddedServer:
    listen = {} if address is None else {"listen": [address]}
    return sidelight_server.serve(small_cnn(), device="cpu", **listen)


def test_a_stream_finds_a_new_replica_by_dns_and_drains_one_that_leaves(listed: list[str]) -> None:
    port = free_port()
    first, second = (f"127.0.0.{i}" for i in (1, 2))
    stop = threading.Event()
    answered: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(replica(f"{first}:{port}"))
        listed.append(first)
        client = stack.enter_context(sidelight.connect(f"dns:{NAME}:{port}", connect_timeout=WITHIN_S))
        pool = client._core.pool

        def read() -> None:
            batches = itertools.takewhile(lambda _: not stop.is_set(), itertools.cycle(BATCHES))
            answered.extend(answer.index for answer in client.stream(batches))

        def at(host: str) -> list[object]:
            return [each for each in pool.connections if each.address == f"{host}:{port}"]

        reader = threading.Thread(target=read)
        reader.start()
        try:
            until(lambda: at(first) and at(first)[0].load.n_unanswered, "the first replica has work")
            stack.enter_context(replica(f"{second}:{port}"))
            listed.append(second)
            until(lambda: at(second) and at(second)[0].load.n_unanswered, "the new replica has work")
            (leaving,) = at(first)
            listed.remove(first)
            until(lambda: not (at(first) or leaving.is_used), "the first replica is left alone")
            assert leaving.load.n_unanswered == 0
            until(lambda: leaving.is_closed, "its connection is closed")
            listed.clear()  # the name servers fail: what is known stays
            n = len(answered)
            until(lambda: len(answered) > n + 20 or not reader.is_alive(), "the stream goes on")
        finally:
            stop.set()
            reader.join(WITHIN_S)
    assert sorted(answered) == list(range(len(answered)))
    assert answered


@pytest.fixture
def two(gate: Gate) -> Iterator[sidelight.Client]:
    """A client connected to two replicas, of which the first waits at the gate while that is shut."""
    with (
        sidelight_server.serve(Gated(gate), device="cpu", drain_s=0) as gated,
        replica() as free,
        sidelight.connect([gated, free], connect_timeout=WITHIN_S) as client,
    ):
        for address in (gated, free):
            with sidelight.connect(address) as each:
                each.attribute(BATCHES[0])  # tried, and warm
        pool = client._core.pool
        pool.connect()
        until(lambda: all(each.is_ready for each in pool.connections), "both are connected")
        yield client
        gate.open()


def test_with_hedging_no_batch_waits_for_a_server_that_hangs(two: sidelight.Client, gate: Gate) -> None:
    gate.shut()
    answers = list(two.stream(BATCHES, hedge_after=0.2, timeout=WITHIN_S, allow_model_change=True))
    assert gate.n_rows  # the server that hangs had received some
    assert sorted(each.index for each in answers) == list(range(len(BATCHES)))
    assert all(each.load.n_unanswered == 0 for each in two._core.pool.connections)


def test_calls_go_to_the_server_with_the_shorter_backlog(two: sidelight.Client) -> None:
    pool = two._core.pool
    for each, backlog_s in zip(pool.connections, (50.0, 0.0), strict=True):
        each.load.record(1, compute_s=0.01, backlog_s=backlog_s, now_s=time.monotonic())
    assert {pool.ready_now() for _ in range(10)} == {pool.connections[1]}


def test_a_name_stands_for_all_its_addresses_and_no_token_is_sent_without_tls(listed: list[str]) -> None:
    with pytest.raises(sidelight.InvalidArgument, match="another machine"):
        sidelight.connect(f"dns:{NAME}:1", token="secret")
    with (
        sidelight.connect(f"dns:///{NAME}:1", connect_timeout=0.2) as client,
        pytest.raises(sidelight.Unavailable, match=f"no server answers at dns:///{NAME}:1"),
    ):
        client.info()
