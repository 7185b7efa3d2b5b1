"""The allocator: which bytes of a shared memory region are taken."""

import bisect

ALIGNMENT = 64  # a line of the processor's cache: neighbours do not share one


class Allocator:
    """Ranges of a number of bytes, taken first fit: as many as a stream has batches in flight, a few dozen."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: list[tuple[int, int]] = []  # start and end, in order

    def take(self, n_bytes: int) -> int | None:
        """Return where a free range begins, which is taken from now on; None where none is large enough."""
        start = 0
        for begins, ends in [*self._taken, (self._size, self._size)]:
            if begins - start >= n_bytes:
                bisect.insort(self._taken, (start, start + n_bytes))
                return start
            start = max(start, -(-ends // ALIGNMENT) * ALIGNMENT)
        return None

    def free(self, start: int) -> None:
        """Give a range back."""
        self._taken = [taken for taken in self._taken if taken[0] != start]

    @property
    def n_taken(self) -> int:
        """How many ranges are taken."""
        return len(self._taken)
