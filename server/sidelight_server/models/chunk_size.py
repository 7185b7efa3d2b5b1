"""Chunk sizes: the measured rate of one, and the limit while memory is short."""

from dataclasses import dataclass

DEFAULT_CHUNK_ROWS = 8  # if nothing can be measured

GOOD_CHUNKS = 16  # successful chunks at the limit before the limit is doubled
MOST_GOOD_CHUNKS = 1024  # the most that this becomes after repeated failures


@dataclass(frozen=True, slots=True)
class ChunkRate:
    """The rate of one chunk size, with the kernel's configuration."""

    rows: int
    rows_per_second: float
    configuration: str
    chosen: bool = False


class RowLimit:
    """The number of rows of one model that fit into memory, lowered after an out-of-memory error.

    Used on the device's thread only. Another process may free memory, so a lowered limit rises again: it doubles after
    `GOOD_CHUNKS` chunks at the limit, and after twice as many each time that the doubled limit fails.
    """

    def __init__(self) -> None:
        self._rows: int | None = None  # None: no limit
        self._n_good = 0
        self._wait = GOOD_CHUNKS
        self._was_raised = False

    def of(self, rows: int) -> int:
        """Return the number of rows, at most `rows`, that may run at once."""
        return rows if self._rows is None else min(rows, self._rows)

    def lower(self, rows: int) -> None:
        """Lower the limit to `rows`, after a chunk of more rows did not fit."""
        if self._rows is not None and rows >= self._rows:
            return  # a chunk from before the limit was lowered
        if self._was_raised:
            self._wait = min(2 * self._wait, MOST_GOOD_CHUNKS)
        self._rows, self._n_good, self._was_raised = rows, 0, False

    def passed(self, rows: int, *, most: int) -> None:
        """Record that a chunk of `rows` fitted; `most` is the chunk size without a memory limit."""
        if self._rows is None or rows < self._rows:
            return
        self._n_good += 1
        if self._n_good < self._wait:
            return
        self._rows, self._n_good, self._was_raised = 2 * self._rows, 0, True
        if self._rows >= most:
            self._rows = None
