"""Eager tasks: run a coroutine directly until its first wait, and make a task only for the rest.

Like `asyncio.Task(…, eager_start=True)`, which needs Python 3.12 and makes a task even if the coroutine never waits.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any

CreateTask = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


def run_eagerly(coroutine: Coroutine[Any, Any, None], create_task: CreateTask) -> "asyncio.Task[None] | None":
    """Run a coroutine until it waits; return the task that continues it, or None if it has ended.

    Until its first wait it runs in the caller's task: it must not use the current task, as `asyncio.timeout` does.
    """
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return None
    return create_task(_Started(coroutine, waits_for))


class _Started(Coroutine[Any, Any, None]):
    """A coroutine that has run to its first wait; a task continues it."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], waits_for: object) -> None:
        self._coroutine = coroutine
        self._waits_for: object | None = waits_for

    def send(self, value: object) -> object:
        if self._waits_for is not None:
            waits_for, self._waits_for = self._waits_for, None
            return waits_for
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> object:  # as `generator.throw`
        self._waits_for = None
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, None]:
        raise TypeError("only a task runs it")
