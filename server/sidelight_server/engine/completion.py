"""Completion: another thread completes a future of the event loop."""

import asyncio
import contextlib
from collections.abc import Callable

from ..errors import SidelightError


def call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Schedule a callback on a loop from any thread, unless the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


def complete(answered: asyncio.Future[None], error: SidelightError | None = None) -> None:
    """Complete a future, or fail it, from any thread, unless it is done or its loop is closed."""

    def complete_unless_done() -> None:
        if answered.done():
            return
        if error is None:
            answered.set_result(None)
        else:
            answered.set_exception(error)

    call_soon(answered.get_loop(), complete_unless_done)
