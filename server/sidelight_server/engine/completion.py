"""Completion: how the device's thread hands finished requests to event loops."""

import asyncio
import contextlib
import functools
from collections.abc import Callable

Callback = Callable[[], None]


def call_soon(loop: asyncio.AbstractEventLoop, callback: Callback) -> None:
    """Schedule a callback on a loop from any thread, unless the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


class Completions:
    """Callbacks for event loops, collected on the device's thread and handed over once per chunk.

    Waking an event loop costs a system call and a change of threads, so each loop is woken once for all requests that
    a chunk has finished.
    """

    def __init__(self) -> None:
        self._collected: dict[asyncio.AbstractEventLoop, list[Callback]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, callback: Callback) -> None:
        """Collect a callback, to run on `loop` after the next `hand_over`."""
        self._collected.setdefault(loop, []).append(callback)

    def hand_over(self) -> None:
        """Schedule the collected callbacks, with one wake-up of each loop."""
        collected, self._collected = self._collected, {}
        for loop, callbacks in collected.items():
            call_soon(loop, functools.partial(_schedule, loop, callbacks))


def _schedule(loop: asyncio.AbstractEventLoop, callbacks: list[Callback]) -> None:
    for callback in callbacks:  # each on its own, so that one that raises does not stop the others
        loop.call_soon(callback)
