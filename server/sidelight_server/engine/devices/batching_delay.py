"""The batching delay: a chunk that is not full waits for callers that were just answered. Standard library only."""

import time
from collections.abc import Callable

# Of the last chunk's time: the most that the delay adds to a latency. With 0.05, one image in fifty came too late.
SHARE = 0.1


class BatchingDelay:
    """The rows that the next chunk waits for, and until when. Used by the device's thread.

    A caller that waits for each answer sends its next request a few milliseconds after it. A chunk that began at once
    would have only the rows that were left over, and so would the one after it: four callers would be served in chunks
    of 1 and 3 rows for ever, which takes longer than chunks of 4.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._n_rows = 0
        self._until_s = 0.0

    def restart(self, *, n_waiting: int, n_answered: int, took_s: float) -> None:
        """Begin the delay after a chunk: as many rows as it answered are expected, beside those that wait."""
        self._n_rows = n_waiting + n_answered
        self._until_s = self._clock() + SHARE * took_s

    def left_s(self, *, n_waiting: int, limit: int) -> float:
        """Return the seconds to wait for more rows; 0 if all expected rows, or `limit`, have arrived."""
        if n_waiting >= min(self._n_rows, limit):
            return 0.0
        return max(0.0, self._until_s - self._clock())
