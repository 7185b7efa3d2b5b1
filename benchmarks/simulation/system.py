"""One run of the simulation: a system of replicas and clients under a load, and its outcome."""

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
    """What is simulated.

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


def simulate(system: System) -> Outcome:
    """Run a system until every batch was delivered."""
    events, rng = Events(), random.Random(system.seed)
    servers = [
        Server(
            events,
            random.Random(rng.random()),
            examples_per_s=100 * SPREAD ** rng.random(),
            mean_life_s=system.mean_life_s,
            restart_s=system.restart_s,
        )
        for _ in range(system.n_servers)
    ]
    arrived_s: dict[int, float] = {}
    took_s: list[float] = []
    delivered: Counter[int] = Counter()
    n_before, last_s = [0], [0.0]

    def deliver(number: int) -> None:
        delivered[number] += 1
        took_s.append(events.now_s - arrived_s[number])
        if len(arrived_s) < system.n_batches:
            n_before[0], last_s[0] = len(took_s), events.now_s
        if system.load is None and len(arrived_s) < system.n_batches:
            give(origin[number])

    n_seen = len(servers) if system.n_clients == 1 else min(MAX_SERVERS, len(servers))
    clients: Sequence[Client | IdealQueue]
    if system.is_ideal:
        clients = [IdealQueue(servers, deliver=deliver)]
    else:
        clients = [
            Client(
                events,
                rng.sample(servers, n_seen),
                window=WINDOW,
                hedge_after_s=system.hedge_after_s,
                deliver=deliver,
            )
            for _ in range(system.n_clients)
        ]
    origin: dict[int, int] = {}
    batch = SimulatedBatch(EXAMPLES)

    def give(client: int) -> None:
        number = len(arrived_s)
        arrived_s[number], origin[number] = events.now_s, client
        clients[client].give(number, batch)

    capacity = sum(each.examples_per_s for each in servers)
    arrivals = random.Random(system.seed + 1)

    def arrive() -> None:
        give(arrivals.randrange(len(clients)))
        if len(arrived_s) < system.n_batches:
            assert system.load is not None
            events.after(arrivals.expovariate(system.load * capacity / EXAMPLES), arrive)

    if system.load is None:  # enough that every window is full and a few batches wait in the caller's iterator
        n_full = 2 + WINDOW // EXAMPLES * n_seen
        for client in range(len(clients)):
            for _ in range(n_full):
                if len(arrived_s) < system.n_batches:
                    events.after(0.0, lambda client=client: give(client))
    else:
        arrive()
    events.run(while_=lambda: len(delivered) < system.n_batches)
    return Outcome(
        n_lost=system.n_batches - len(delivered),
        n_doubled=delivered.total() - len(delivered),
        n_given_up=sum(each.n_given_up for each in clients if isinstance(each, Client)),
        n_late=sum(each.n_late for each in clients if isinstance(each, Client)),
        examples_per_s=EXAMPLES * n_before[0] / last_s[0],
        capacity=capacity,
        p50_s=statistics.median(took_s),
        p99_s=statistics.quantiles(took_s, n=100)[98],
    )


def ideal(system: System) -> Outcome:
    """Run the same arrivals through the ideal queue."""
    return simulate(replace(system, is_ideal=True))
