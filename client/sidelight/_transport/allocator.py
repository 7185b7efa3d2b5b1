"""The allocator of byte ranges in a shared memory region."""

import bisect

ALIGNMENT = 64  # a cache line, so that no two ranges share one


class Allocator:
    """First-fit allocation of byte ranges: one for each part in flight, a few dozen."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._taken: list[tuple[int, int]] = []  # (start, end), sorted

    def take(self, n_bytes: int) -> int | None:
        """Allocate a range and return its start; None if no free range is large enough."""
        start = 0
        for begins, ends in [*self._taken, (self._size, self._size)]:
            if begins - start >= n_bytes:
                bisect.insort(self._taken, (start, start + n_bytes))
                return start
            start = max(start, -(-ends // ALIGNMENT) * ALIGNMENT)
        return None

    def free(self, start: int) -> None:
        self._taken = [taken for taken in self._taken if taken[0] != start]

    @property
    def n_taken(self) -> int:
        return len(self._taken)
