"""Load balancing: estimates the load of each server, and chooses one. Standard library only, no clock.

Each answer reports the backlog of its server: the seconds of work that wait there, of all callers. The client adds what
it has sent since then, and chooses the server that is expected to finish first. A backlog that was reported more than a
second ago is replaced by the average of the reported ones.
"""

import math
import threading
from collections.abc import Iterable
from typing import TypeVar

STALE_S = 1.0  # how long a reported backlog counts unchanged
FORGET_S = 10.0  # after this time an estimate is dropped, so that a server that was slow once is tried again
WEIGHT = 0.2  # weight of the newest answer in the moving averages of speed and backlog
EQUAL = 1.25  # servers whose estimates differ by less are used in turn: estimates are noisy, and clients must spread

_Server = TypeVar("_Server")


class Load:
    """The load of one server, as far as one client knows. Thread-safe."""

    def __init__(self) -> None:
        self.n_unanswered = 0  # examples of this client
        self._n_since = 0  # examples sent since the backlog was reported
        self._backlog_s = 0.0
        self._mean_backlog_s = 0.0
        self._example_s = 0.0
        self._reported_s = -math.inf
        self._lock = threading.Lock()

    def sent(self, n_examples: int) -> None:
        with self._lock:
            self.n_unanswered += n_examples
            self._n_since += n_examples

    def ended(self, n_examples: int) -> None:
        """Record that sent examples were answered, or will not be."""
        with self._lock:
            self.n_unanswered -= n_examples
            self._n_since = min(self._n_since, self.n_unanswered)

    def record(self, n_examples: int, *, compute_s: float, backlog_s: float, now_s: float) -> None:
        """Record what an answer reports: the time to compute its examples, and the work that waited then."""
        with self._lock:
            is_known = now_s - self._reported_s < FORGET_S
            if n_examples and compute_s:
                self._example_s = _average(self._example_s if is_known else 0.0, compute_s / n_examples)
            self._mean_backlog_s = _average(self._mean_backlog_s, backlog_s) if is_known else backlog_s
            self._backlog_s, self._reported_s, self._n_since = backlog_s, now_s, 0

    def example_s(self, now_s: float) -> float:
        """Return the server's time for one example; 0 if it is not known."""
        return self._example_s if now_s - self._reported_s < FORGET_S else 0.0

    def finish_s(self, n_examples: int, now_s: float, *, unknown_s: float) -> float:
        """Return the estimated time until examples that are sent now are computed, in seconds.

        `unknown_s` is the time for one example of a server that has not answered lately.
        """
        example_s = self.example_s(now_s) or unknown_s
        age_s = now_s - self._reported_s
        backlog_s = self._backlog_s if age_s < STALE_S else self._mean_backlog_s if age_s < FORGET_S else 0.0
        waiting_s = max(backlog_s + self._n_since * example_s, self.n_unanswered * example_s)
        return waiting_s + n_examples * example_s


def _average(mean: float, newest: float) -> float:
    return mean + WEIGHT * (newest - mean) if mean else newest


def least_loaded(servers: Iterable[tuple[_Server, Load]], n_examples: int, now_s: float) -> _Server | None:
    """Return the server that should finish `n_examples` first, the first of nearly equal ones; None without servers."""
    servers = list(servers)
    if len(servers) < 2:
        return servers[0][0] if servers else None
    known_s = [example_s for _, load in servers if (example_s := load.example_s(now_s))]
    unknown_s = min(known_s, default=1.0)  # a new server is assumed to be as fast as the fastest
    finish_s = [load.finish_s(n_examples, now_s, unknown_s=unknown_s) for _, load in servers]
    limit_s = EQUAL * min(finish_s)
    return next(server for (server, _), each_s in zip(servers, finish_s, strict=True) if each_s <= limit_s)
