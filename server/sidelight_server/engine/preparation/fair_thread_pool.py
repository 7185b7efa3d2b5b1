"""A thread pool that takes its work round-robin by caller."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from ...errors import Unavailable
from ..completion import complete

_Value = TypeVar("_Value")


class FairThreadPool:
    """Up to `size` threads that run functions round-robin by caller, and those of one caller in order."""

    def __init__(self, size: int, *, name: str) -> None:
        self._threads = ThreadPoolExecutor(size, thread_name_prefix=name)
        self._lock = threading.Lock()  # guards the fields below
        self._callers: dict[str, deque[_Work[Any]]] = {}  # in round-robin order; no deque is empty
        self._is_closed = False

    def submit(self, caller: str, function: Callable[[], _Value]) -> Future[_Value]:
        """Run a function on a thread. Raises `Unavailable` once the pool is closed."""
        work = _Work(function)
        with self._lock:
            if self._is_closed:
                raise _unavailable()
            self._callers.setdefault(caller, deque()).append(work)
            self._threads.submit(self._run_next)
        return work

    def close(self, *, wait: bool = False) -> None:
        """Fail what has not begun with `Unavailable`. `wait`: also wait until the threads have ended."""
        with self._lock:
            self._is_closed = True
            waiting = [work for each in self._callers.values() for work in each]
            self._callers.clear()
        for work in waiting:
            work.fail(_unavailable())
        self._threads.shutdown(wait=wait)

    def _run_next(self) -> None:
        with self._lock:
            if not self._callers:  # closed
                return
            caller, waiting = next(iter(self._callers.items()))
            del self._callers[caller]
            work = waiting.popleft()
            if waiting:
                self._callers[caller] = waiting
        work.run()


class _Work(Future[_Value]):
    """A function and its result. Cancelling drops the function at once, and with it the caller's data."""

    def __init__(self, function: Callable[[], _Value]) -> None:
        super().__init__()
        self._function: Callable[[], _Value] | None = function

    def cancel(self) -> bool:
        if was_cancelled := super().cancel():
            self._function = None
        return was_cancelled

    def run(self) -> None:
        if self.set_running_or_notify_cancel():
            complete(self, self._take())

    def _take(self) -> Callable[[], _Value]:
        """Return the function, which this no longer holds."""
        function, self._function = self._function, None
        assert function is not None  # noqa: S101  (only what was cancelled has none)
        return function

    def fail(self, error: Exception) -> None:
        self._function = None
        if self.set_running_or_notify_cancel():
            self.set_exception(error)


def _unavailable() -> Unavailable:
    return Unavailable("the server is shutting down")
