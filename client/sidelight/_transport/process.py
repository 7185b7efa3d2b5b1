"""Process exit and fork: closes clients and streams at exit, and rejects their use in a forked child."""

import atexit
import gc
import os
import weakref
from typing import Protocol

from ..exceptions import FailedPrecondition


class _Closable(Protocol):
    def close(self) -> None: ...


class Origin:
    """The process in which an object was created. gRPC's threads do not survive a fork, but their locks stay held."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_in_own_process(self) -> bool:
        return self._pid == os.getpid()

    def check(self) -> None:
        """Raise `FailedPrecondition` in a forked child of it."""
        if not self.is_in_own_process:
            raise FailedPrecondition(
                f"the client was made in process {self._pid}, from which this one was forked: call connect() here again"
            )


_open: "weakref.WeakSet[_Closable]" = weakref.WeakSet()


def close_at_exit(each: _Closable) -> None:
    """Close an object before the interpreter shuts down.

    Shutdown stops daemon threads wherever they are, even while they hold locks. A generator that is closed only after
    that, when module globals are cleared, would wait for these locks forever.
    """
    _open.add(each)


@atexit.register
def _close_all() -> None:
    closing = list(_open)
    for each in closing:
        each.close()
    if closing:
        # A failed call is an exception whose traceback references the call. If it were collected during shutdown, it
        # would wait for a lock held by one of gRPC's stopped threads.
        gc.collect()
