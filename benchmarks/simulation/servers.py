"""Simulated servers: each runs one batch after the other at its own speed, and may die and come back."""

import functools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .events import Events

JITTER = 0.2  # a batch takes its mean time ± this share


@dataclass(frozen=True, slots=True)
class ReportedLoad:
    """The server's load, as an answer reports it."""

    compute_s: float
    backlog_s: float


Answered = Callable[[ReportedLoad], None]


class Server:
    """A server with one queue. `mean_life_s` is the mean time until it dies; it is back after `restart_s`."""

    def __init__(
        self, events: Events, rng: random.Random, *, examples_per_s: float, mean_life_s: float, restart_s: float
    ) -> None:
        self.examples_per_s = examples_per_s
        self.is_up = True
        self.busy_s = 0.0
        self.on_death: list[Callable[[], None]] = []
        self.on_return: list[Callable[[], None]] = []
        self._events, self._rng = events, rng
        self._deaths = random.Random(rng.random())  # a generator of its own, so that deaths do not depend on the load
        self._mean_life_s, self._restart_s = mean_life_s, restart_s
        self._queue: deque[tuple[int, Answered]] = deque()  # the first one runs
        self._n_examples = 0
        self._life = 0  # number of the current life: events of an earlier one have no effect
        self._live()

    def submit(self, n_examples: int, answered: Answered) -> None:
        """Queue a batch. A dead server loses it; its clients learn of its death by themselves."""
        if not self.is_up:
            return
        self._queue.append((n_examples, answered))
        self._n_examples += n_examples
        if len(self._queue) == 1:
            self._begin()

    def _begin(self) -> None:
        n_examples, _ = self._queue[0]
        took_s = n_examples / self.examples_per_s * self._rng.uniform(1 - JITTER, 1 + JITTER)
        self._events.after(took_s, functools.partial(self._end, self._life, took_s))

    def _end(self, life: int, took_s: float) -> None:
        if life != self._life:
            return
        n_examples, answered = self._queue.popleft()
        self._n_examples -= n_examples
        self.busy_s += took_s
        if self._queue:
            self._begin()
        answered(ReportedLoad(took_s, self._n_examples / self.examples_per_s))

    def _live(self) -> None:
        if self._mean_life_s:
            self._events.after(self._deaths.expovariate(1 / self._mean_life_s), self._die)

    def _die(self) -> None:
        self.is_up = False
        self._life += 1
        self._queue.clear()
        self._n_examples = 0
        for each in self.on_death:
            each()
        self._events.after(self._restart_s, self._return)

    def _return(self) -> None:
        self.is_up = True
        self._live()
        for each in self.on_return:
            each()
