"""Process exit and fork: what they mean to clients and streams."""

import atexit
import gc
import os
import weakref
from typing import Protocol

from ..exceptions import FailedPrecondition


class _Closing(Protocol):
    def close(self) -> None: ...


class Origin:
    """The process that something was made in. gRPC's threads, and the locks that they hold, do not survive a fork."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_in_own_process(self) -> bool:
        """Whether that is this process."""
        return self._pid == os.getpid()

    def check(self) -> None:
        """Raise `FailedPrecondition` in a child of that process."""
        if not self.is_in_own_process:
            raise FailedPrecondition(
                f"the client was made in process {self._pid} and this one was forked from it: call connect() here again"
            )


_open: "weakref.WeakSet[_Closing]" = weakref.WeakSet()


def close_at_exit(each: _Closing) -> None:
    """Close something before the interpreter ends.

    Later its daemon threads are stopped wherever they are, with the locks that they hold: a generator that is closed
    then, as its module's globals are taken away, would wait for these for ever.
    """
    _open.add(each)


@atexit.register
def _close_all() -> None:
    closing = list(_open)
    for each in closing:
        each.close()
    if closing:
        # A call that failed is an exception whose traceback holds the call. Collected at the interpreter's end, it
        # would wait for a lock that a thread of gRPC's was stopped with.
        gc.collect()
