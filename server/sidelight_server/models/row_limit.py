"""The limit of a chunk's rows: lowered where memory runs out, raised again while it does not."""

GOOD_CHUNKS = 16  # as large as they may be, before twice as many rows are tried
MOST_GOOD_CHUNKS = 1024  # the same, where trying has failed again and again


class RowLimit:
    """How many rows of one model fit into memory, as far as that is known. Used by the device's thread alone.

    Another process on the device may give memory back, so what was lowered rises again: it doubles after some chunks of
    that many rows, and after twice as many chunks each time that the next size fails.
    """

    def __init__(self) -> None:
        self._rows: int | None = None  # None: nothing has failed, or all is as before
        self._n_good = 0
        self._wait = GOOD_CHUNKS
        self._was_raised = False

    def of(self, rows: int) -> int:
        """Return how many of so many rows may run at once."""
        return rows if self._rows is None else min(rows, self._rows)

    def lower(self, rows: int) -> None:
        """More than so many rows did not fit, and are not tried for a while."""
        if self._rows is not None and rows >= self._rows:
            return  # a chunk that was taken before
        if self._was_raised:
            self._wait = min(2 * self._wait, MOST_GOOD_CHUNKS)
        self._rows, self._n_good, self._was_raised = rows, 0, False

    def passed(self, rows: int, *, most: int) -> None:
        """A chunk of so many rows fitted; `most` is what a chunk may have where memory allows it."""
        if self._rows is None or rows < self._rows:
            return
        self._n_good += 1
        if self._n_good < self._wait:
            return
        self._rows, self._n_good, self._was_raised = 2 * self._rows, 0, True
        if self._rows >= most:
            self._rows = None
