"""Waiting for conditions, without sleeping and with a timeout."""

import asyncio
import contextlib
import queue
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np

from support.messages.attribution import ask, floats
from support.servers.running import TIMEOUT_S, Counts, Running


def until_no_stream_is_left(server: Running) -> None:
    async def until() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while server.counts().streams:  # noqa: ASYNC110  (it is the loop that removes them)
                await asyncio.sleep(0)

    server.run(until())


def until_none(batches: queue.Queue[np.ndarray | None]) -> Iterator[np.ndarray]:
    while (batch := batches.get(timeout=TIMEOUT_S)) is not None:
        yield batch


def until(server: Running, reached: Callable[[], bool]) -> None:
    """Let the server run until a condition holds."""

    until_s = time.monotonic() + TIMEOUT_S
    while not reached():
        assert time.monotonic() < until_s, "it has not come to that in time"
        server.run(asyncio.sleep(0.005))


def counts(server: Running) -> Counts:
    """Resources that a server holds, except threads, some of which start with the first batch that needs them."""
    return replace(Counts.of(server), threads=0)


@contextlib.contextmanager
def leaving_nothing(server: Running) -> Iterator[None]:
    """Check that a good request is answered afterwards, and that all counts come back to where they were."""
    server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
    before = counts(server)
    yield
    server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
    until(server, lambda: not counts(server).exceeds(before))


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 10))

    return run


async def settle() -> None:
    """Run every task as far as possible: each step wakes at most the next task."""
    for _ in range(10):
        await asyncio.sleep(0)
