"""Simulated clients: the client's own scheduling code, on the virtual clock; and the ideal queue to compare with."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidelight._streaming.scheduling.dispatcher import Dispatcher
from sidelight._streaming.scheduling.parts import Entry, Part
from sidelight._streaming.scheduling.resend_queue import ResendQueue

from .events import Events
from .servers import ReportedLoad, Server

NETWORK_S = 0.001  # each way
FOREVER_S = 1e12  # no batch has a deadline
Delivered = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class SimulatedBatch:
    """A number of examples."""

    n_examples: int
    id: str | None = None

    def __len__(self) -> int:
        return self.n_examples

    def part(self, span: range) -> "SimulatedBatch":
        """Return a part of it."""
        return SimulatedBatch(len(span))


class Client:
    """One stream to some servers: what `sidelight._streaming.stream` does around the dispatcher, without threads."""

    def __init__(
        self, events: Events, servers: Sequence[Server], *, window: int, hedge_after_s: float | None, deliver: Delivered
    ) -> None:
        self.n_given_up = 0
        self.n_late = 0  # answers to parts that had been answered already
        self._events, self._deliver = events, deliver
        self._queue = ResendQueue(window=window, hedge_after_s=hedge_after_s)
        self._dispatcher = Dispatcher(self._queue)
        self._arrived: deque[tuple[int, SimulatedBatch]] = deque()
        self._index = itertools.count()
        self._numbers: dict[int, int] = {}
        self._wake_s: float | None = None
        for server in servers:
            self._queue.add_worker(server)
            self._dispatcher.add_idle(server)
            server.on_death.append(functools.partial(events.after, NETWORK_S, functools.partial(self._lost, server)))
            server.on_return.append(functools.partial(self._found, server))

    def give(self, number: int, batch: SimulatedBatch) -> None:
        """Add a batch to the caller's iterator."""
        self._arrived.append((number, batch))
        self._act()

    def _act(self) -> None:
        """Act for the workers' threads until all of them wait."""
        now_s = self._events.now_s
        while True:
            n_examples = len(self._arrived[0][1]) if self._arrived else 1
            if (server := self._dispatcher.next_to_send(now_s, n_examples)) is not None:
                part = self._dispatcher.take(server, now_s)
                assert part is not None
                assert isinstance(server, Server)
                self._dispatcher.add_idle(server)
                answered = functools.partial(self._answer, server, part)
                self._events.after(NETWORK_S, functools.partial(server.submit, len(part.batch), answered))
            elif self._arrived and (reader := self._dispatcher.next_to_read(now_s)) is not None:
                self._dispatcher.leave(reader)
                self._read()
                self._dispatcher.add_idle(reader)
            else:
                break
        self._sleep(now_s)

    def _read(self) -> None:
        number, batch = self._arrived.popleft()
        index = next(self._index)
        self._numbers[index] = number
        self._queue.add(Entry(index, batch, FOREVER_S), [range(len(batch))])  # type: ignore[arg-type]  # as much of an EncodedBatch as scheduling needs

    def _sleep(self, now_s: float) -> None:
        """Act again when a part may be sent to a second server."""
        due_s = self._queue.next_retry_s(now_s)
        if due_s is not None and (self._wake_s is None or not now_s < self._wake_s <= due_s):
            self._wake_s = due_s
            self._events.after(due_s - now_s, self._act)

    def _answer(self, server: Server, part: Part, reported: ReportedLoad) -> None:
        self._events.after(NETWORK_S, functools.partial(self._receive, server, part, reported))

    def _receive(self, server: Server, part: Part, reported: ReportedLoad) -> None:
        load = self._queue.load(server)
        if self._queue.pop(part.id, server) is part:
            self._queue.mark_delivered()
            self._queue.release(part.entry)
            self._deliver(self._numbers.pop(part.entry.index))
        else:
            self._queue.forget(part.id, server)
            self.n_late += 1
        load.record(
            len(part.batch), compute_s=reported.compute_s, backlog_s=reported.backlog_s, now_s=self._events.now_s
        )
        self._act()

    def _lost(self, server: Server) -> None:
        self._dispatcher.leave(server)
        for part in self._queue.requeue_after_call_end(server, died=True):
            self.n_given_up += 1
            self._deliver(self._numbers.pop(part.entry.index))
        self._act()

    def _found(self, server: Server) -> None:
        self._dispatcher.add_idle(server)
        self._act()


class IdealQueue:
    """One queue in front of all servers. It needs no time for the network and sees every death at once."""

    def __init__(self, servers: Sequence[Server], *, deliver: Delivered) -> None:
        self._deliver = deliver
        self._waiting: deque[tuple[int, SimulatedBatch]] = deque()
        self._free = dict.fromkeys(sorted(servers, key=lambda each: -each.examples_per_s))
        self._running: dict[Server, tuple[int, SimulatedBatch]] = {}
        for server in servers:
            server.on_death.append(functools.partial(self._lost, server))
            server.on_return.append(functools.partial(self._release, server))

    def give(self, number: int, batch: SimulatedBatch) -> None:
        """Queue a batch."""
        self._waiting.append((number, batch))
        self._act()

    def _act(self) -> None:
        while self._waiting and self._free:
            server = max(self._free, key=lambda each: each.examples_per_s)
            del self._free[server]
            self._running[server] = self._waiting.popleft()
            server.submit(len(self._running[server][1]), functools.partial(self._answer, server))

    def _answer(self, server: Server, _: ReportedLoad) -> None:
        number, _batch = self._running.pop(server)
        self._deliver(number)
        self._release(server)

    def _release(self, server: Server) -> None:
        self._free[server] = None
        self._act()

    def _lost(self, server: Server) -> None:
        self._free.pop(server, None)
        if server in self._running:
            self._waiting.appendleft(self._running.pop(server))
            self._act()
