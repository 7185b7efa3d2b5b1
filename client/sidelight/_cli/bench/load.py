"""A load: callers that send requests to a server, one thread each, until they are stopped.

In a closed loop, a caller sends its next request after an answer, and a stream keeps its window full. In an open loop,
a schedule sets the times, and the next free caller sends. If no caller is free, a request is sent late, but its latency
counts from when it was due. So a server that stalls is charged for all requests that were due in the meantime.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal, Self

import numpy as np

from ..._clients.client import Client
from ...exceptions import SidelightError
from .recorder import Recorder, Ticket
from .traffic import Sent, Traffic

PAUSE_S = 0.1  # pause after a failed stream
JOIN_S = 10.0

Arrivals = Literal["constant", "poisson"]


class Load:
    """Callers that run inside a `with` block. Its end closes the client; requests in flight then are not counted.

    `arrivals` are in seconds from the start; None is a closed loop.
    """

    def __init__(
        self,
        client: Client,
        traffic: Traffic,
        recorder: Recorder,
        *,
        n_callers: int,
        arrivals: Iterator[float] | None = None,
    ) -> None:
        self._client = client
        self._traffic = traffic
        self._recorder = recorder
        self._arrivals = arrivals
        self._batches = itertools.cycle(traffic.batches)
        self._next = threading.Lock()  # guards the arrivals and the batches
        self._stopped = threading.Event()
        self._fault: Exception | None = None
        work = self._stream if traffic.is_streamed else self._call
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=f"sidelight-bench-{i}", daemon=True)
            for i in range(n_callers)
        ]
        self._began_s = 0.0

    def __enter__(self) -> Self:
        self._began_s = time.perf_counter()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stopped.set()
        self._client.close()  # ends the calls that wait for an answer
        self.join(JOIN_S)

    def run(self, seconds: float) -> None:
        """Let the callers run for a time. Re-raises an unexpected exception of a caller."""
        self._stopped.wait(seconds)
        if self._fault is not None:
            raise self._fault

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the callers, which end when the arrivals do."""
        deadline_s = None if timeout_s is None else time.perf_counter() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline_s is None else max(0.0, deadline_s - time.perf_counter()))

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a bug, or a call on the client that `__exit__` closed
            if not self._stopped.is_set():
                self._fault = error
                self._stopped.set()

    def _turns(self) -> Iterator[tuple[float | None, Sent]]:
        """Yield batches when they are due, with that time on `time.perf_counter`, or None in a closed loop."""
        while not self._stopped.is_set():
            with self._next:
                batch = next(self._batches)
                after_s = None if self._arrivals is None else next(self._arrivals, -1.0)
            if after_s is None:
                yield None, batch
                continue
            due_s = self._began_s + after_s
            if after_s < 0 or self._stopped.wait(max(0.0, due_s - time.perf_counter())):
                return
            yield due_s, batch

    def _call(self) -> None:
        for due_s, batch in self._turns():
            ticket = self._recorder.sent(due_s)
            try:
                answer = self._traffic.call(self._client, batch)
            except SidelightError as error:
                self._failed([ticket], error)
            else:
                self._recorder.answered(ticket, answer)

    def _stream(self) -> None:
        """Send on one stream, and on a new one if that fails."""
        while not self._stopped.is_set():
            tickets: dict[int, Ticket] = {}  # by the batch's position
            try:
                for answer in self._traffic.stream(self._client, self._sent(tickets)):
                    self._recorder.answered(tickets.pop(answer.index), answer)
            except SidelightError as error:
                self._failed(list(tickets.values()), error)
                self._stopped.wait(PAUSE_S)
            else:
                return

    def _sent(self, tickets: dict[int, Ticket]) -> Iterator[Sent]:
        """Yield the batches of a stream, which reads them when its window has room."""
        for index, (due_s, batch) in enumerate(self._turns()):
            tickets[index] = self._recorder.sent(due_s)
            yield batch

    def _failed(self, tickets: list[Ticket], error: SidelightError) -> None:
        if self._stopped.is_set():  # the client was closed
            return
        for ticket in tickets:
            self._recorder.failed(ticket, error)
        if self._arrivals is None:
            self._stopped.wait(error.retry_delay_s or 0.0)  # the delay that the server has requested


def arrivals(kind: Arrivals, rate: float, *, seed: int = 0) -> Iterator[float]:
    """Return the due times of an open loop, in seconds from its start, without end."""
    if kind == "constant":
        return (i / rate for i in itertools.count())  # not a running sum: its rounding error would grow
    random = np.random.default_rng(seed)
    return itertools.accumulate(random.exponential(1 / rate) for _ in itertools.count())
