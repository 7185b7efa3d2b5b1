"""The retry policy of unary calls: which errors are retried, and after which delay.

Attribution has no side effects, so repeating a call is safe.
"""

import logging
import time

from .._options import FOR_EVER_S
from ..exceptions import Cancelled, ResourceExhausted, SidelightError, Unavailable

log = logging.getLogger("sidelight")

DEATHS = 2  # servers that may go away during one call until it fails: the call may be the cause
GONE_DELAY_S = 0.05  # until the channel has noticed that its server is gone
# A call that its caller did not cancel was cancelled by the server or a proxy, for example under overload.
FIRST_CANCELLED_DELAY_S, LONGEST_CANCELLED_DELAY_S = 0.05, 2.0


class RetryPolicy:
    """The deadline of one call, and the errors that it has had so far."""

    def __init__(self, timeout_s: float, *, retry: bool) -> None:
        self._deadline_s = time.monotonic() + min(timeout_s, FOR_EVER_S)
        self._retry = retry
        self._n_gone = 0
        self._n_cancelled = 0

    @property
    def left_s(self) -> float:
        """The remaining time in seconds; 0 after the deadline."""
        return max(0.0, self._deadline_s - time.monotonic())

    def delay_after(self, error: SidelightError) -> float:
        """Return the delay before the next attempt, in seconds. Raises the error if there is no next attempt."""
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
            # A server that is full or still loading its models names the delay.
            delay_s = error.retry_delay_s if isinstance(error, ResourceExhausted | Unavailable) else None
        if delay_s is None or delay_s >= self.left_s:
            raise error
        log.info("calling again in %.2g s: %s: %s", delay_s, type(error).__name__, error)
        return delay_s
