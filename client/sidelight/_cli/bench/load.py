"""A load: callers that keep a server busy, each in a thread of its own, until they are stopped.

In a closed loop a caller sends its next request, or as many as its stream's window holds, once it has an answer. In an
open loop the schedule says when, and a caller that is free takes the next time: where none is, requests leave late,
but are timed from when they were due, so that a server that stalls is charged with all who would have come meanwhile.
"""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

from ..._client import Client
from ...exceptions import SidelightError
from .recorder import Recorder, Ticket
from .traffic import Sent, Traffic

PAUSE_S = 0.1  # after a stream that failed, where the server does not say how long
JOIN_S = 10.0


class Turn(NamedTuple):
    """A batch, and when it was due on the clock of `time.perf_counter`; None where no schedule says so."""

    due_s: float | None
    batch: Sent


class Load:
    """Callers at work, from `with` to its end, which closes the client: what is on its way then is not counted.

    `arrivals` are seconds from the beginning; None is a closed loop.
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
        self._next = threading.Lock()  # of the arrivals and the batches
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
        self._client.close()  # whoever waits for an answer is woken
        self.join(JOIN_S)

    def run(self, seconds: float) -> None:
        """Let the callers work for a time. Raises what stopped one of them."""
        self._stopped.wait(seconds)
        if self._fault is not None:
            raise self._fault

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the callers, which end by themselves where the arrivals do."""
        deadline_s = None if timeout_s is None else time.perf_counter() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline_s is None else max(0.0, deadline_s - time.perf_counter()))

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a mistake of ours, or of the end: a closed client cannot be asked
            if not self._stopped.is_set():
                self._fault = error
                self._stopped.set()

    def _turns(self) -> Iterator[Turn]:
        """Yield batches, each when it is due."""
        while not self._stopped.is_set():
            with self._next:
                batch = next(self._batches)
                after_s = None if self._arrivals is None else next(self._arrivals, -1.0)
            if after_s is None:
                yield Turn(None, batch)
                continue
            due_s = self._began_s + after_s
            if after_s < 0 or self._stopped.wait(max(0.0, due_s - time.perf_counter())):
                return
            yield Turn(due_s, batch)

    def _call(self) -> None:
        """Send unary calls, one after another."""
        for turn in self._turns():
            ticket = self._recorder.sent(turn.due_s)
            try:
                answer = self._traffic.call(self._client, turn.batch)
            except SidelightError as error:
                self._failed([ticket], error)
            else:
                self._recorder.answered(ticket, answer)

    def _stream(self) -> None:
        """Send on one stream; on another where that ends before its time."""
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
        for index, turn in enumerate(self._turns()):
            tickets[index] = self._recorder.sent(turn.due_s)
            yield turn.batch

    def _failed(self, tickets: list[Ticket], error: SidelightError) -> None:
        if self._stopped.is_set():  # the client was closed
            return
        for ticket in tickets:
            self._recorder.failed(ticket, error)
        if self._arrivals is None:
            self._stopped.wait(error.retry_delay_s or 0.0)  # a caller does as a full server asks
