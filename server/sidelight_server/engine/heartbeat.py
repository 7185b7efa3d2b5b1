"""The heartbeat: whether a thread that runs one task after another still makes progress. Standard library only."""

import time
from collections.abc import Callable

# A chunk beside others on a busy host was seen to take a few times as long as alone, and never ten times.
SLACK = 10.0


class Heartbeat:
    """What the thread that owns a device has done last. That thread alone writes; any may read.

    It beats when it takes something up and when that has come back. It is stuck once it has been at one thing for
    longer than `stuck_s`, and than ten times the longest chunk; `stuck_s` 0: never. The clock is monotonic: setting
    the wall clock changes nothing.
    """

    def __init__(self, *, stuck_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stuck_s = stuck_s
        self._clock = clock
        self._beat_s: float | None = None  # when the last was; None while there is nothing to do
        self.longest_s = 0.0  # of what has come back, and was not stuck

    def beat(self, *, counts: bool = True) -> None:
        """Say that what was at work has come back, if anything was, and that the next is."""
        self._note(counts)
        self._beat_s = self._clock()

    def rest(self, *, counts: bool = True) -> None:
        """Say that there is nothing more to do."""
        self._note(counts)
        self._beat_s = None

    @property
    def at_work_s(self) -> float:
        """How long the thread has been at one thing; 0 where it is at none."""
        beat_s = self._beat_s
        return 0.0 if beat_s is None else self._clock() - beat_s

    @property
    def limit_s(self) -> float:
        """How long it may be at one thing."""
        return max(self._stuck_s, SLACK * self.longest_s)

    @property
    def is_stuck(self) -> bool:
        """Whether it has been at one thing for too long."""
        return bool(self._stuck_s) and self.at_work_s > self.limit_s

    def _note(self, counts: bool) -> None:
        # One that was stuck says nothing of how long chunks take: it would hide the next.
        took_s = self.at_work_s
        if counts and not (self._stuck_s and took_s > self.limit_s):
            self.longest_s = max(self.longest_s, took_s)
