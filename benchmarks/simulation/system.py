"""One run of the simulation: a system of replicas and clients under a load, and its outcome."""

import functools
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sidelight._transport.resolver import MAX_SERVERS

from .clients import Client, IdealQueue, SimulatedBatch
from .events import Events
from .servers import Server

EXAMPLES = 8  # of a batch
WINDOW = 64  # of a stream for each server: twice the chunk of 32 rows
SPREAD = 4.0  # speed of the fastest server over that of the slowest


@dataclass(frozen=True, slots=True)
class System:
    """The simulated system.

    `load` is the arrival rate over the sum of the servers' rates; None means that each client always has a next batch.
    `mean_life_s` 0 means that no server dies.
    """

    n_servers: int
    n_batches: int
    n_clients: int = 1
    load: float | None = None
    mean_life_s: float = 0.0
    restart_s: float = 5.0
    hedge_after_s: float | None = None
    is_ideal: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run. Times are in seconds."""

    n_lost: int
    n_doubled: int
    n_given_up: int
    n_late: int
    examples_per_s: float
    capacity: float  # the sum of the servers' examples per second
    p50_s: float
    p99_s: float

    @property
    def utilization(self) -> float:
        """The share of the servers' capacity that was used."""
        return self.examples_per_s / self.capacity


class _Run:
    """One run: its servers and clients, and when each batch arrived and was delivered."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._events = Events()
        rng = random.Random(system.seed)
        self._servers = [
            Server(
                self._events,
                random.Random(rng.random()),
                examples_per_s=100 * SPREAD ** rng.random(),
                mean_life_s=system.mean_life_s,
                restart_s=system.restart_s,
            )
            for _ in range(system.n_servers)
        ]
        self._n_seen = system.n_servers if system.n_clients == 1 else min(MAX_SERVERS, system.n_servers)
        self._clients: Sequence[Client | IdealQueue]
        if system.is_ideal:
            self._clients = [IdealQueue(self._servers, deliver=self._deliver)]
        else:
            self._clients = [
                Client(
                    self._events,
                    rng.sample(self._servers, self._n_seen),
                    window=WINDOW,
                    hedge_after_s=system.hedge_after_s,
                    deliver=self._deliver,
                )
                for _ in range(system.n_clients)
            ]
        self._capacity = sum(each.examples_per_s for each in self._servers)
        self._batch = SimulatedBatch(EXAMPLES)
        self._arrivals = random.Random(system.seed + 1)
        self._arrived_s: dict[int, float] = {}
        self._origin: dict[int, int] = {}  # the client of each batch
        self._took_s: list[float] = []
        self._delivered: Counter[int] = Counter()
        self._n_before, self._last_s = 0, 0.0  # deliveries before the last arrival, and the time of the last of them

    def outcome(self) -> Outcome:
        """Run until every batch was delivered."""
        if self._system.load is None:
            self._fill_windows()
        else:
            self._arrive(self._system.load)
        n_batches = self._system.n_batches
        self._events.run(while_=lambda: len(self._delivered) < n_batches)
        return Outcome(
            n_lost=n_batches - len(self._delivered),
            n_doubled=self._delivered.total() - len(self._delivered),
            n_given_up=sum(each.n_given_up for each in self._clients if isinstance(each, Client)),
            n_late=sum(each.n_late for each in self._clients if isinstance(each, Client)),
            examples_per_s=EXAMPLES * self._n_before / self._last_s,
            capacity=self._capacity,
            p50_s=statistics.median(self._took_s),
            p99_s=statistics.quantiles(self._took_s, n=100)[98],
        )

    @property
    def _has_more(self) -> bool:
        return len(self._arrived_s) < self._system.n_batches

    def _give(self, client: int) -> None:
        number = len(self._arrived_s)
        self._arrived_s[number], self._origin[number] = self._events.now_s, client
        self._clients[client].give(number, self._batch)

    def _deliver(self, number: int) -> None:
        self._delivered[number] += 1
        self._took_s.append(self._events.now_s - self._arrived_s[number])
        if self._has_more:
            self._n_before, self._last_s = len(self._took_s), self._events.now_s
            if self._system.load is None:
                self._give(self._origin[number])

    def _arrive(self, load: float) -> None:
        self._give(self._arrivals.randrange(len(self._clients)))
        if self._has_more:
            delay_s = self._arrivals.expovariate(load * self._capacity / EXAMPLES)
            self._events.after(delay_s, functools.partial(self._arrive, load))

    def _fill_windows(self) -> None:
        """Give each client enough batches to fill its windows, and a few that wait in the caller's iterator."""
        for client in range(len(self._clients)):
            for _ in range(2 + WINDOW // EXAMPLES * self._n_seen):
                self._events.after(0.0, functools.partial(self._give_if_any, client))

    def _give_if_any(self, client: int) -> None:
        if self._has_more:
            self._give(client)


def simulate(system: System) -> Outcome:
    """Run a system until every batch was delivered."""
    return _Run(system).outcome()


def ideal(system: System) -> Outcome:
    """Run the same arrivals through the ideal queue."""
    return simulate(replace(system, is_ideal=True))
