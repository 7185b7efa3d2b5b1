"""Completion: passes the results of a thread's work to futures and to callbacks on event loops."""

import asyncio
import contextlib
import functools
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

_Value = TypeVar("_Value")

Callback = Callable[[], None]


def call_soon(loop: asyncio.AbstractEventLoop, callback: Callback) -> None:
    """Schedule a callback on a loop from any thread, unless the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


def complete(future: "Future[_Value]", function: Callable[[], _Value]) -> None:
    """Call a function and store its result or exception in a future that is running."""
    try:
        future.set_result(function())
    except BaseException as error:
        # The traceback holds the frames of the function and, by `f_back`, of this thread, so it is in a cycle with the
        # future. What those frames hold, such as a request's arrays, must not wait for the garbage collector.
        traceback.clear_frames(error.__traceback__)
        future.set_exception(error)
        del function


def forget_frames(error: BaseException) -> None:
    """Drop the tracebacks of an error that was handled, and of the errors before it.

    Their frames hold a request's arrays, and some refer to the error: a reference cycle, which would keep the arrays in
    memory until the garbage collector runs.
    """
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = each.__cause__ = None
        each.__context__, each = None, each.__context__


def forget_cancellation(task: "asyncio.Task[Any]") -> None:
    """Drop the traceback of the `CancelledError` that a cancelled task keeps. A done callback."""
    if task.cancelled():
        try:
            task.result()
        except asyncio.CancelledError as cancelled:
            forget_frames(cancelled)


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
