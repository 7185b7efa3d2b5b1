"""The write timeout: cuts off calls whose client does not accept the response.

gRPC's asyncio server has no such timeout: a write waits for the client without limit, and a status would wait behind
it. But gRPC drops a call whose tasks are cancelled, and resets the stream of a dropped call.
"""

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

from .reading import end_abandoned

Task = asyncio.Task[Any]


class WriteTimeout:
    """The write timeout of one server's calls. Used on the event loop only."""

    def __init__(self, *, within_s: float) -> None:
        """`within_s` 0 means no limit on how long a client may take to accept an answer."""
        self._within_s = within_s
        self._makers: weakref.WeakKeyDictionary[Task, weakref.ref[Task]] = weakref.WeakKeyDictionary()

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Record which task creates which, on a loop that does not run a call yet."""
        make: Any = loop.get_task_factory() or _make

        def make_recorded(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Task:
            task: Task = make(loop, coroutine, **options)
            if maker := asyncio.current_task(loop):
                self._makers[task] = weakref.ref(maker)
            return task

        loop.set_task_factory(make_recorded)

    def expect(self, on_cut_off: Callable[[], None] = lambda: None) -> None:
        """Start the timeout for the answer that the current call is about to return."""
        if not self._within_s or (call := asyncio.current_task()) is None:
            return

        def cut_off(call: Task) -> None:
            on_cut_off()
            self.cut_off(call)

        timer = asyncio.get_running_loop().call_later(self._within_s, cut_off, call)
        call.add_done_callback(lambda _: timer.cancel())

    def cut_off(self, call: Task) -> None:
        """Reset the call whose handler runs in this task."""
        maker = self._makers.get(call)
        if maker and (watching := maker()):  # gRPC's task that waits for a disconnect; it holds the call
            watching.cancel()
        end_abandoned(call)
        call.cancel()


def _make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Task:
    return asyncio.Task(coroutine, loop=loop, **options)
