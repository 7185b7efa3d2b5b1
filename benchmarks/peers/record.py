"""The record of a rival: rates and latencies of its closed loops, by the number of unanswered images."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

NEAR_BEST = 0.97


@dataclass(frozen=True, slots=True)
class Round:
    """Rate and latency of one closed loop."""

    rate: float  # images/s
    p99_s: float


@dataclass(frozen=True, slots=True)
class Record:
    """The rounds, by the number of unanswered images."""

    rounds: dict[int, list[Round]] = field(default_factory=dict)

    def add(self, at_once: int, round_: Round) -> None:
        self.rounds.setdefault(at_once, []).append(round_)

    def rate(self, at_once: int) -> float:
        """Return the median of the rounds' rates."""
        return statistics.median(each.rate for each in self.rounds[at_once])

    def p99_s(self, at_once: int) -> float:
        """Return the median of the rounds' percentiles: on a shared machine a round may be disturbed."""
        return statistics.median(each.p99_s for each in self.rounds[at_once])

    def best(self) -> int:
        """Return its best operating point: the lowest p99 among those with at least 97 % of the best rate."""
        fastest = max(self.rate(n) for n in self.rounds)
        return min((n for n in self.rounds if self.rate(n) >= NEAR_BEST * fastest), key=self.p99_s)

    def fastest_within(self, p99_s: float) -> int | None:
        """Return the fastest operating point whose p99 is no worse; None if there is none."""
        return max((n for n in self.rounds if self.p99_s(n) <= p99_s), key=self.rate, default=None)

    def times(self, at_once: int, other: "Record", other_at_once: int) -> float:
        """Return the speedup: the median of the ratios of the rounds."""
        pairs = zip(self.rounds[at_once], other.rounds[other_at_once], strict=True)
        return statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least a given share of all values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
