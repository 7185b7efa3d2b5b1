"""Cancellation latency: how soon a cancelled request leaves the device."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CancellationTimes:
    """The times from a cancellation to the end of the request's last row on the device, in seconds."""

    count: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """The mean; 0 where there was none."""
        return self.total_s / self.count if self.count else 0.0

    def __add__(self, other: "CancellationTimes") -> "CancellationTimes":
        """Return the times of both."""
        longest_s = max(self.longest_s, other.longest_s)
        return CancellationTimes(self.count + other.count, self.total_s + other.total_s, longest_s)


class CancellationLatency:
    """A record of latencies. Only the device's thread writes it; any thread may read it, for it is replaced whole."""

    def __init__(self) -> None:
        self._times = CancellationTimes()

    def add(self, seconds: float) -> None:
        """Record one."""
        was = self._times
        self._times = CancellationTimes(was.count + 1, was.total_s + seconds, max(was.longest_s, seconds))

    def times(self) -> CancellationTimes:
        """Return what was recorded so far."""
        return self._times
