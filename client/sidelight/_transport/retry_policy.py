"""Retries: what may be tried again, and when. Attribution changes nothing, so repeating a call is safe."""

import logging
import time

from ..exceptions import Cancelled, ResourceExhausted, SidelightError, Unavailable

log = logging.getLogger("sidelight")

DEATHS = 2  # servers that may go away under one call: it may be the cause
GONE_DELAY_S = 0.05  # until the channel has seen that its server is gone
# A call that its caller did not cancel was cancelled by a server, or by what stands before it, for another's sake.
FIRST_CANCELLED_DELAY_S, LONGEST_CANCELLED_DELAY_S = 0.05, 2.0


class RetryPolicy:
    """One call's own time, and what has gone wrong in it."""

    def __init__(self, timeout_s: float, *, retry: bool) -> None:
        self._deadline_s = time.monotonic() + timeout_s
        self._retry = retry
        self._n_gone = 0
        self._n_cancelled = 0

    @property
    def left_s(self) -> float:
        """How much of its time is left, in seconds; 0 where it is over."""
        return max(0.0, self._deadline_s - time.monotonic())

    def delay_after(self, error: SidelightError) -> float:
        """Return how long to wait before the next attempt, in seconds; raise the error where there is none."""
        if not self._retry:
            raise error
        delay_s: float | None
        if isinstance(error, Cancelled):
            delay_s = min(FIRST_CANCELLED_DELAY_S * 2 ** min(self._n_cancelled, 8), LONGEST_CANCELLED_DELAY_S)
            self._n_cancelled += 1
        elif isinstance(error, Unavailable) and error.retry_delay_s is None:
            self._n_gone += 1
            delay_s = GONE_DELAY_S if self._n_gone < DEATHS else None
        else:
            # A server that is full, or is loading its models yet, says so.
            delay_s = error.retry_delay_s if isinstance(error, ResourceExhausted | Unavailable) else None
        if delay_s is None or delay_s >= self.left_s:
            raise error
        log.info("calling again in %.2g s: %s: %s", delay_s, type(error).__name__, error)
        return delay_s
