"""The write timeout: cuts off calls whose caller does not accept the response.

gRPC's asyncio server has no such thing: a call waits for its caller as long as that likes, and a status that is sent
then waits behind the answer. It lets go of a call whose tasks are cancelled, and what is let go of is reset.
"""

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

Task = asyncio.Task[Any]


class WriteTimeout:
    """The calls of one server that are being ended. The event loop's."""

    def __init__(self, *, within_s: float) -> None:
        """Without `within_s`, 0, there is no bound on how long a caller may take to accept an answer."""
        self._within_s = within_s
        self._makers: weakref.WeakKeyDictionary[Task, weakref.ref[Task]] = weakref.WeakKeyDictionary()

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take note of which task has made which, on a loop that runs no call yet."""
        make: Any = loop.get_task_factory() or _make

        def make_noted(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Task:
            task: Task = make(loop, coroutine, **options)
            if maker := asyncio.current_task(loop):
                self._makers[task] = weakref.ref(maker)
            return task

        loop.set_task_factory(make_noted)

    def expect(self, on_cut_off: Callable[[], None] = lambda: None) -> None:
        """Cut the current call off unless the answer that it is about to return is accepted in time."""
        if not self._within_s or (call := asyncio.current_task()) is None:
            return

        def cut_off(call: Task) -> None:
            on_cut_off()
            self.cut_off(call)

        timer = asyncio.get_running_loop().call_later(self._within_s, cut_off, call)
        call.add_done_callback(lambda _: timer.cancel())

    def cut_off(self, call: Task) -> None:
        """Reset a call, by the task that its handler runs in."""
        maker = self._makers.get(call)
        if maker and (watching := maker()):  # it waits for the caller to go, and would keep the call until then
            watching.cancel()
        call.cancel()


def _make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Task:
    return asyncio.Task(coroutine, loop=loop, **options)
