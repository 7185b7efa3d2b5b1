"""A histogram that is cheap to add to. Standard library only."""

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """How many values fell at or under each bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last has what is above all bounds
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
