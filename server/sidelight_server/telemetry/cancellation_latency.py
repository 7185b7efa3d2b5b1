"""Cancellation latency: the time from a cancel until no row of the request runs on the device."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CancellationTimes:
    """Statistics of cancellation latencies, in seconds."""

    count: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """The mean; 0 if the count is 0."""
        return self.total_s / self.count if self.count else 0.0

    def __add__(self, other: "CancellationTimes") -> "CancellationTimes":
        longest_s = max(self.longest_s, other.longest_s)
        return CancellationTimes(self.count + other.count, self.total_s + other.total_s, longest_s)


class CancellationLatency:
    """Records latencies. Only the device's thread writes; any thread may read, because the value is replaced whole."""

    def __init__(self) -> None:
        self._times = CancellationTimes()

    def add(self, seconds: float) -> None:
        was = self._times
        self._times = CancellationTimes(was.count + 1, was.total_s + seconds, max(was.longest_s, seconds))

    def times(self) -> CancellationTimes:
        return self._times
