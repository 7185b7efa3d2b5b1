"""Decoder processes of an engine and of a server."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sidelight
from sidelight_server import Engine, Files, Request, Settings
from sidelight_server.engine.request_cost import cost_of
from sidelight_server.errors import InvalidArgument

from support import TESTS
from support.models import sized_cnn
from support.servers.decoders import GOOD, SLOW, UNTIL_S, children, noise, until, until_decoding

SIZED = "python:support.models:sized_cnn"


def engine(**settings: object) -> Engine:
    return Engine([sized_cnn()], Settings(device="cpu", **settings))


def test_good_callers_are_answered_beside_one_of_slow_files() -> None:
    async def ask(engine: Engine) -> None:
        hostile = asyncio.create_task(engine.attribute(Request(Files((GOOD, SLOW, GOOD)))))
        good = await asyncio.gather(*(engine.attribute(Request(Files((GOOD,) * 3))) for _ in range(8)))
        assert not any(each.failures for each in good)
        failures = (await hostile).failures
        assert [(each.example, each.code) for each in failures] == [(1, InvalidArgument.code)]

    with engine(threads=2, max_decode_s=0.5) as running:
        asyncio.run(ask(running))
    assert not children()


def test_pixels_do_not_wait_for_files() -> None:
    async def ask(engine: Engine) -> None:
        hostile = asyncio.create_task(engine.attribute(Request(Files((SLOW,) * 4))))
        await until_decoding()
        assert not (await engine.attribute(Request(noise(2, 48, 64, 3)))).failures
        assert not hostile.done()
        hostile.cancel()
        await asyncio.wait([hostile])

    with engine(threads=1, max_decode_s=100) as running:
        asyncio.run(ask(running))


def test_the_pixels_that_files_become_count_in_the_permit() -> None:
    running = engine()
    version = running.registry.serving("")
    held = [sum(cost_of(Request(Files((GOOD,) * n)), version[0])[:2]) for n in (1, 9)]
    floats = [sum(cost_of(Request(np.zeros((n, 3, 32, 32), np.float32)), version[0])[:2]) for n in (1, 9)]
    # Once for each picture, and once more when the batch is made of them.
    assert (held[1] - held[0]) - (floats[1] - floats[0]) == 2 * 8 * 3 * 32 * 32


def test_an_engine_without_files_starts_no_process() -> None:
    with engine() as running:
        asyncio.run(running.attribute(Request(noise(2, 48, 64, 3))))
        assert not children()


def serving(tmp_path: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    address = f"unix:{tmp_path}/socket"
    command = [sys.executable, "-m", "sidelight_server", "--model", SIZED, "--listen", address]
    command += ["--device", "cpu", "--metrics-listen", "", *flags]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    while "event=serving" not in (line := process.stderr.readline()):
        assert line
    return process, address


@contextlib.contextmanager
def asked_for(address: str, file: bytes) -> Iterator[None]:
    """A caller who waits for a file's map."""

    async def ask() -> None:
        async with sidelight.aio.connect(address, connect_timeout=10, retry=False) as client:
            with contextlib.suppress(sidelight.SidelightError):
                await client.attribute([file], timeout=100)

    with _in_thread(ask()):
        yield


@contextlib.contextmanager
def _in_thread(coroutine: Coroutine[Any, Any, None]) -> Iterator[None]:
    thread = threading.Thread(target=asyncio.run, args=(coroutine,))
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_server_is_the_end_of_its_decoders(tmp_path: Path, number: int) -> None:
    process, address = serving(tmp_path, "--max-decode-s", "1000", "--drain-s", "1", "--threads", "2")
    with process, asked_for(address, SLOW):
        until(lambda: len(children(process.pid)) == 2)  # started with the server, the second perhaps a little later
        until(lambda: any(each.cpu_times().user > 0.5 for each in children(process.pid)))
        decoders = children(process.pid)
        process.send_signal(number)
        assert process.wait(UNTIL_S) == (0 if number == signal.SIGTERM else -number)
        assert not psutil.wait_procs(decoders, UNTIL_S)[1]
