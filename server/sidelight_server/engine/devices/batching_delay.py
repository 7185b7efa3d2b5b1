"""The batching delay: a chunk that is not full waits for callers that were just answered. Standard library only."""

import time
from collections.abc import Callable

# Share of the last chunk's time: the longest delay of one chunk. With 0.05, one image in fifty came too late.
SHARE = 0.1


class BatchingDelay:
    """The requests that the next chunk waits for, and until when. Used by the device's thread.

    A caller that waits for each answer sends its next request a few milliseconds after it. A chunk that began at once
    would have only the rows that were left over, and so would the one after it: four callers would be served in chunks
    of 1 and 3 rows forever, which takes longer than chunks of 4.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._n_requests = 0
        self._until_s = 0.0

    def restart(self, *, n_waiting: int, n_answered: int, took_s: float) -> None:
        """Begin the delay after a chunk: as many requests as it answered are expected, beside those that wait."""
        self._n_requests = n_waiting + n_answered
        self._until_s = self._clock() + SHARE * took_s

    def left_s(self, *, n_waiting: int) -> float:
        """Return the seconds to wait for more requests; 0 if all expected ones have arrived."""
        return 0.0 if n_waiting >= self._n_requests else max(0.0, self._until_s - self._clock())
