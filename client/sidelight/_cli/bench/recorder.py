"""The recorder: collects the callers' results in the current window.

A request counts in the window in which it ends; its lateness counts in the window in which it was sent.
"""

import random
import threading
import time
from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...exceptions import PartialFailure, SidelightError
from ...results.attribution import Attribution

MAX_VALUES = 1_000_000  # of a sample: 8 MB
LATE_S = 0.010  # a request sent more than this after its due time is late


class Sample:
    """A uniform sample of at most `limit` of the numbers that were added: Vitter, 1985, algorithm R.

    Count, sum and maximum are those of all numbers.
    """

    def __init__(self, *, limit: int = MAX_VALUES, seed: int = 0) -> None:
        self.count = 0
        self.sum = 0.0
        self.max = 0.0
        self._limit = limit
        self._random = random.Random(seed)
        self._values = array("d")

    def add(self, value: float) -> None:
        self.count += 1
        self.sum += value
        self.max = max(self.max, value)
        if len(self._values) < self._limit:
            self._values.append(value)
        elif (index := self._random.randrange(self.count)) < self._limit:
            self._values[index] = value

    @property
    def values(self) -> NDArray[np.float64]:
        return np.array(self._values, np.float64)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A request in flight, with its due time and send time on the clock of `time.perf_counter`."""

    number: int
    due_s: float
    sent_s: float


@dataclass(slots=True)
class Fault:
    """The number of failures of one type, and the first message."""

    count: int
    message: str


class Window:
    """The requests that ended in one interval. Sums are in seconds, over the answered requests."""

    def __init__(self, *, seed: int = 0) -> None:
        self.began_s, self.ended_s = time.perf_counter(), 0.0
        self.cpu_s = -time.process_time()
        self.latency = Sample(seed=seed)  # from when a request was due
        self.lateness = Sample(seed=seed)  # of requests in an open loop
        self.n_late = 0
        self.n_images = 0
        self.n_rows = 0
        self.late_s = 0.0
        self.prepare_s = 0.0
        self.queue_s = 0.0
        self.compute_s = 0.0
        self.server_s = 0.0
        self.faults: dict[str, Fault] = {}

    def end(self) -> None:
        self.ended_s = time.perf_counter()
        self.cpu_s += time.process_time()


class Recorder:
    """Counts requests in windows. Thread-safe: callers count, and the measuring thread calls `cut`."""

    def __init__(self, *, seed: int = 0) -> None:
        self._lock = threading.Lock()
        self._seed = seed
        self._window = Window(seed=seed)
        self._in_flight: dict[int, Ticket] = {}
        self._n_sent = 0

    def sent(self, due_s: float | None) -> Ticket:
        """Count a request that is about to be sent. `due_s` is None in a closed loop."""
        now_s = time.perf_counter()
        with self._lock:
            ticket = Ticket(self._n_sent, now_s if due_s is None else due_s, now_s)
            self._n_sent += 1
            self._in_flight[ticket.number] = ticket
            if due_s is not None:
                self._window.lateness.add(max(0.0, now_s - due_s))
                self._window.n_late += now_s - due_s > LATE_S
        return ticket

    def answered(self, ticket: Ticket, answer: Attribution) -> None:
        """Count an answer; one with a failed example as a failure."""
        now_s = time.perf_counter()
        if answer.error is not None or answer.failures:
            self.failed(ticket, answer.error or PartialFailure(answer))
            return
        timing = answer.timing
        with self._lock:
            del self._in_flight[ticket.number]
            window = self._window
            window.latency.add(now_s - ticket.due_s)
            window.late_s += ticket.sent_s - ticket.due_s
            window.n_images += len(answer)
            window.n_rows += sum(1 if each is None else each.rows for each in answer.convergence)
            if timing is not None:
                window.prepare_s += timing.prepare_s
                window.queue_s += timing.queue_s
                window.compute_s += timing.compute_s
                window.server_s += timing.total_s

    def failed(self, ticket: Ticket, error: SidelightError) -> None:
        with self._lock:
            del self._in_flight[ticket.number]
            fault = self._window.faults.setdefault(type(error).__name__, Fault(0, str(error)))
            fault.count += 1

    def cut(self) -> Window:
        """End the window, begin another, and return the one that ended."""
        with self._lock:
            ended = self._window
            ended.end()
            self._window = Window(seed=self._seed)
        return ended

    def unanswered_s(self) -> list[float]:
        """Return the seconds since the due time of each request in flight."""
        with self._lock:
            now_s = time.perf_counter()
            return [now_s - each.due_s for each in self._in_flight.values()]
