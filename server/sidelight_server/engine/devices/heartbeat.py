"""The heartbeat of a device worker: detects a stuck thread. Standard library only."""

import time
from collections.abc import Callable

# On a busy host a chunk was seen to take a few times as long as on an idle one, never ten times.
STUCK_FACTOR = 10.0


class Heartbeat:
    """The time at which the device's thread began its current work. Only that thread writes; any thread may read.

    The thread calls `beat` when it begins a piece of work, and `rest` when it becomes idle. It is stuck once one piece
    of work takes longer than both `stuck_s` and ten times the longest chunk; `stuck_s` 0 means never. The clock is
    monotonic, so changes of the wall clock have no effect.
    """

    def __init__(self, *, stuck_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stuck_s = stuck_s
        self._clock = clock
        self._beat_s: float | None = None  # time of the last beat; None while idle
        self.longest_s = 0.0  # the longest completed work that was not stuck

    def beat(self) -> None:
        """Record that the previous work, if any, has completed and the next begins."""
        self._note()
        self._beat_s = self._clock()

    def rest(self, *, extends_limit: bool = True) -> None:
        """Record that the previous work has completed and the thread is idle."""
        self._note(extends_limit=extends_limit)
        self._beat_s = None

    @property
    def at_work_s(self) -> float:
        """Seconds since the current work began; 0 while idle."""
        beat_s = self._beat_s
        return 0.0 if beat_s is None else self._clock() - beat_s

    @property
    def limit_s(self) -> float:
        """Seconds that one piece of work may take before the thread counts as stuck."""
        return max(self._stuck_s, STUCK_FACTOR * self.longest_s)

    @property
    def is_stuck(self) -> bool:
        return bool(self._stuck_s) and self.at_work_s > self.limit_s

    def _note(self, *, extends_limit: bool = True) -> None:
        # Work that was stuck is left out: it would raise the limit and hide the next stall.
        took_s = self.at_work_s
        if extends_limit and not (self._stuck_s and took_s > self.limit_s):
            self.longest_s = max(self.longest_s, took_s)
