"""The life of a client: servers that come later, restarts, closing, and threads that share a client."""

import itertools
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from PIL import Image

from support.models.gate import Gate
from support.tolerances import assert_same

ABSENT = "unix:/nonexistent/socket"


@pytest.fixture
def waiting() -> Iterator[tuple[threading.Event, list[str]]]:
    """An event that is set when a client logs, and the log messages."""
    came, lines = threading.Event(), []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())
            came.set()

    handler = Handler()
    logging.getLogger("sidelight").addHandler(handler)
    yield came, lines
    logging.getLogger("sidelight").removeHandler(handler)


def test_connecting_returns_at_once_without_a_server() -> None:
    with sidelight.connect(ABSENT, connect_timeout=3600) as client:
        assert client.address == ABSENT


def test_a_call_waits_for_a_server_that_starts_later_and_logs_it(
    spec: sidelight_server.ModelSpec,
    device: str,
    floats: torch.Tensor,
    tmp_path: Path,
    waiting: tuple[threading.Event, list[str]],
) -> None:
    came, lines = waiting
    address = f"unix:{tmp_path}/socket"
    with sidelight.connect(address, connect_timeout=60) as client, ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(client.attribute, floats), pool.submit(lambda: list(client.stream([floats])))]
        assert came.wait(30)
        assert not any(call.done() for call in calls)
        with sidelight_server.serve(spec, device=device, listen=(address,)):
            assert calls[0].result().maps.shape == (5, 32, 32)
            assert calls[1].result()[0].maps.shape == (5, 32, 32)
    assert f"waiting for a server at {address}" in lines


def test_a_client_finds_its_server_again_after_a_restart(
    spec: sidelight_server.ModelSpec, device: str, floats: torch.Tensor, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/socket"
    with sidelight.connect(address, connect_timeout=30) as client:
        for _ in range(3):
            with sidelight_server.serve(spec, device=device, listen=(address,)):
                assert client.attribute(floats).maps.shape == (5, 32, 32)


def test_a_server_on_a_port_is_reached_by_host_and_port(
    spec: sidelight_server.ModelSpec, device: str, floats: torch.Tensor
) -> None:
    with sidelight_server.serve(spec, device=device, listen=("127.0.0.1:0",)) as address:
        assert address.startswith("127.0.0.1:")
        with sidelight.connect(address, connect_timeout=10) as client:
            assert len(client.attribute(floats)) == 5


CALLS: dict[str, Callable[[sidelight.Client], object]] = {
    "attribute": lambda client: client.attribute(np.zeros((3, 32, 32), np.float32)),
    "stream": lambda client: list(client.stream([np.zeros((3, 32, 32), np.float32)])),
    "info": lambda client: client.info(),
    "model": lambda client: client.model(),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@each_call
def test_without_a_server_a_call_ends_at_connect_timeout_and_names_the_address(
    call: Callable[[sidelight.Client], object],
) -> None:
    with sidelight.connect(ABSENT, connect_timeout=0.3) as client, pytest.raises(sidelight.Unavailable) as caught:
        call(client)
    message = "no server answers at unix:/nonexistent/socket after 0.3 s; is sidelight-server running there?"
    assert caught.value.message == message


def test_a_port_without_a_server_is_named() -> None:
    with socket.socket() as taken:  # bound, so that no other program gets it, but not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            sidelight.connect(address, connect_timeout=0.2) as client,
            pytest.raises(sidelight.Unavailable, match=address),
        ):
            client.info()


@pytest.mark.parametrize("address", ["", 50051, b"unix:/run/x"], ids=repr)
def test_an_invalid_address_is_refused(address: object) -> None:
    with pytest.raises(
        sidelight.InvalidArgument, match=r'address: got .*, expected "host:port", "dns:host:port" or "unix:/path"'
    ):
        sidelight.connect(address)


@each_call
@pytest.mark.parametrize("used", [True, False], ids=["after-a-call", "before-any-call"])
def test_a_closed_client_is_unavailable_and_may_be_closed_again(
    address: str, call: Callable[[sidelight.Client], object], used: bool
) -> None:
    client = sidelight.connect(address, connect_timeout=10)
    if used:
        client.info()
    client.close()
    with pytest.raises(sidelight.Unavailable, match="the client is closed"):
        call(client)
    client.close()


def test_closing_ends_a_call_that_waits_for_a_server(waiting: tuple[threading.Event, list[str]]) -> None:
    client = sidelight.connect(ABSENT, connect_timeout=60)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.info)
        assert waiting[0].wait(30)
        client.close()
        with pytest.raises(sidelight.Unavailable, match="the client is closed"):
            call.result(30)


def test_closing_ends_a_running_call(gate: Gate, gated: str, floats: torch.Tensor) -> None:
    client = sidelight.connect(gated, connect_timeout=10)
    gate.shut()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.attribute, floats)
        assert gate.reached.wait(30)
        client.close()
        with pytest.raises(sidelight.exceptions.Cancelled):
            call.result(30)


def test_closing_one_client_leaves_another_of_the_same_server_alone(address: str, floats: torch.Tensor) -> None:
    with sidelight.connect(address, connect_timeout=10) as stays:
        with sidelight.connect(address, connect_timeout=10) as goes:
            goes.attribute(floats)
            stays.attribute(floats)
        assert len(stays.attribute(floats)) == 5


def test_threads_share_a_client_and_get_what_serial_calls_get(client: sidelight.Client, floats: torch.Tensor) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    questions = [
        {"images": floats},
        {"images": floats[:2], "target": [3, "ibis"], "score": "logit"},
        {"images": image, "target": 4},  # the very same PIL image in all threads
        {"images": [image, rng.integers(0, 256, (33, 44, 3), np.uint8)], "channels": "none"},
        {"images": rng.integers(0, 256, (32, 32, 3), np.uint8), "method": sidelight.Gradient(times_input=True)},
    ]
    expected = [client.attribute(**question) for question in questions]

    def calls(thread: int) -> list[tuple[int, sidelight.Attribution]]:
        places = [(thread + call) % len(questions) for call in range(25)]
        return [(place, client.attribute(**questions[place])) for place in places]

    with ThreadPoolExecutor(8) as pool:
        answers = list(itertools.chain.from_iterable(pool.map(calls, range(8))))
    assert len(answers) == 200
    for place, answer in answers:
        assert_same(answer.maps, expected[place].maps)
        assert [each.index for each in answer.targets] == [each.index for each in expected[place].targets]
