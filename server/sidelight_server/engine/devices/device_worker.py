"""The device worker: the one thread that owns a device. It takes chunks, runs them and returns the results."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from prometheus_client import Histogram

from ...compute.staging import Staging
from ...errors import SidelightError, Unavailable
from ...telemetry.counters import CancellationTimes
from ...telemetry.logs import Event
from ..active_request import ActiveRequest
from ..completion import Completions
from ..example_run import Row
from ..scheduler import Scheduler
from .batching_delay import BatchingDelay
from .chunk_errors import ChunkErrors, DeviceLostError
from .chunk_results import ChunkResults
from .heartbeat import Heartbeat
from .row_rate import RowRate
from .running_chunk import RunningChunk, by_request

log = logging.getLogger("sidelight")

CHUNK_ROWS = tuple(2**power for power in range(13))  # bounds of the histogram of chunk sizes

Taken = tuple[ActiveRequest, Row]
_InFlight = tuple[list[Taken], RunningChunk | SidelightError]
_Value = TypeVar("_Value")


class DeviceWorker:
    """The worker thread of a device; owns the device's scheduler and staging buffers.

    At most `depth` chunks are in flight. A failing chunk is split until the bad example is alone, and only that example
    fails. A chunk that does not fit into device memory is halved, and larger ones are not tried for a while (see
    `RowLimit`); a chunk padded to `reproducible_rows` cannot be halved and fails. If the device is lost, the thread
    ends. `on_end` is called when the thread has ended, for whatever reason: it answers no more requests.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        threads: int,
        depth: int = 0,
        stuck_s: float = 0.0,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.errors = ChunkErrors(device)
        # Set once the device is lost. Its traceback keeps the failed pass's tensors alive on purpose: freeing memory
        # on a lost device may abort the process.
        self.loss: DeviceLostError | None = None
        self._device = device
        self._threads = threads
        # A GPU computes one chunk while the host reads the previous one. On a CPU that would only take rows too early.
        self._depth = depth or (2 if device.type == "cuda" else 1)
        self._on_end = on_end
        self._staging = Staging(device)
        self._results = ChunkResults(self.errors, self._staging)
        self._scheduler: Scheduler[Taken] = Scheduler()
        self._tasks: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._in_flight: deque[_InFlight] = deque()
        self._delay = BatchingDelay()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"sidelight-{device}", daemon=True)
        self.completions = Completions()
        self.cancellations = CancellationTimes()  # replaced whole by this thread, so any thread may read it
        self.chunk_rows = Histogram("sidelight_chunk_rows", "rows that ran at once", buckets=CHUNK_ROWS, registry=None)
        self.heartbeat = Heartbeat(stuck_s=stuck_s)
        self.row_rate = RowRate()

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests can be submitted."""
        return not self._closed and self._thread.is_alive()

    def submit(self, active: ActiveRequest) -> None:
        """Add a request to the scheduler. Raises `Unavailable` if the worker has ended."""
        with self._changed:
            self._check_alive()
            self._scheduler.add(active)
            self._changed.notify()

    def withdraw(self, active: ActiveRequest) -> None:
        """Drop a request's rows that have not run; free its memory once none of its rows is in flight."""
        active.cancel()
        with self._changed:
            self._scheduler.remove(active)
            if not active.n_running:
                active.free_memory()

    def call(self, task: Callable[[], _Value]) -> "Future[_Value]":
        """Run a function on the device's thread, between two chunks. Raises `Unavailable` as `submit` does.

        It runs once the chunks in flight have completed and before any other chunk. A future that is cancelled before
        that does not run.
        """
        future: Future[_Value] = Future()
        with self._changed:
            self._check_alive()
            self._tasks.append((task, future))
            self._changed.notify()
        return future

    def close(self, within_s: float | None = None) -> bool:
        """Stop after the running chunk. Return False if the thread has not ended within `within_s` seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(within_s)
        return not self._thread.is_alive()

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise self.unavailable("the server is not running, or is shutting down")

    def unavailable(self, otherwise: str) -> Unavailable:
        """Return the error for requests after the thread has ended: a lost device, else `otherwise`."""
        return Unavailable(f"the server's device {self._device} has failed" if self.loss else otherwise)

    def _run(self) -> None:
        # OpenMP keeps this number per thread, but torch also applies it to later threads: set it only if it differs.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # for tensors that a model's code creates on "cuda"
        try:
            while self._step():
                pass
        except DeviceLostError as lost:
            self.loss = lost
            log.critical(Event("device_lost", device=self._device, message=str(lost)), exc_info=lost.__cause__)
        finally:
            self.heartbeat.rest(extends_limit=False)  # an ended thread is not a stuck one
            with self._changed:
                self._closed = True
            for _, future in self._tasks:  # otherwise their waiters would wait forever
                if future.set_running_or_notify_cancel():
                    future.set_exception(self.unavailable("the server is shutting down"))
            self.completions.hand_over()  # of a chunk that the device was lost in
            self._on_end()

    def _step(self) -> bool:
        """Launch the next chunk and complete earlier ones. A function, so that no chunk stays alive while idle."""
        rows = self._take_chunk()
        if rows is None:
            return False
        if rows:
            self._in_flight.append((rows, self._launch(rows)))
        # Without new rows, complete all chunks in flight: their requests may then have more rows.
        while len(self._in_flight) >= (self._depth if rows else 1):
            self._complete(*self._in_flight.popleft())
        return True

    def _take_chunk(self) -> list[Taken] | None:
        """Return the next rows; wait for some only if nothing is in flight. None once closed.

        Returns no rows while a task waits for the chunks in flight: otherwise the task might wait forever.
        """
        with self._changed:
            if not (self._in_flight or self._tasks or len(self._scheduler)):
                self.heartbeat.rest()
            self._changed.wait_for(lambda: self._closed or self._in_flight or self._tasks or len(self._scheduler))
            while (left_s := self._delay_left_s()) > 0:
                self._changed.wait(left_s)
            if self._closed:
                return None
            if self._tasks and self._in_flight:
                return []
            task = self._tasks.popleft() if self._tasks else None
            first = self._scheduler.first()
            if task is None and isinstance(first, ActiveRequest):
                return by_request(self._scheduler.take_chunk(first.max_chunk_rows))
        if task is not None:
            self._run_task(*task)
        return []

    def _delay_left_s(self) -> float:
        """Return how long the next chunk waits for more requests."""
        first = self._scheduler.first()
        if self._closed or self._in_flight or self._tasks or not isinstance(first, ActiveRequest):
            return 0.0
        left_s = self._delay.left_s(n_waiting=len(self._scheduler))
        is_full = left_s > 0 and self._scheduler.n_rows(at_most=first.max_chunk_rows) >= first.max_chunk_rows
        return 0.0 if is_full else left_s

    def _run_task(self, task: Callable[[], _Value], future: "Future[_Value]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        self.heartbeat.beat()
        try:
            future.set_result(task())
        except BaseException as error:  # whose traceback must keep the tensors of a lost device: see `loss`
            future.set_exception(error)
            self.errors.check_device(error)
        self.heartbeat.rest(extends_limit=False)  # a task may run many chunks, or compile

    def _launch(self, rows: Sequence[Taken]) -> RunningChunk | SidelightError:
        self.heartbeat.beat()
        self.chunk_rows.observe(len(rows))
        try:
            return RunningChunk(rows, self._staging)
        # Even SystemExit: a model must not end the thread that serves all requests.
        except BaseException as error:
            return self.errors.to_domain_error(rows[0][0], rows[0][1].example_run, error, n_rows=len(rows))

    def _complete(self, rows: list[Taken], chunk: RunningChunk | SidelightError) -> None:
        """Read a chunk, fold its rows, and put requests that have new rows back into the scheduler."""
        active_requests = list(dict.fromkeys(active for active, _ in rows))
        had_none = [active for active in active_requests if not active.pending]
        self._collect(rows, chunk)
        with self._changed:
            for active, _ in rows:
                active.n_running -= 1
            for active in active_requests:
                if active.cancelled and not active.n_running:
                    if active.cancelled_s is not None:
                        took_s = time.monotonic() - active.cancelled_s
                        self.cancellations += CancellationTimes(1, took_s, took_s)
                    active.free_memory()
                elif active in had_none and not active.cancelled:
                    self._scheduler.add(active)
                elif not active.pending:  # its remaining rows were those of an example that failed
                    self._scheduler.remove(active)
            self._delay.restart(
                n_waiting=len(self._scheduler),
                n_answered=sum(active.is_done for active in active_requests),
                took_s=time.monotonic() - chunk.began_s if isinstance(chunk, RunningChunk) else 0.0,
            )
        self.completions.hand_over()

    def _collect(self, rows: Sequence[Taken], chunk: RunningChunk | SidelightError) -> None:
        failure, outputs = chunk if isinstance(chunk, SidelightError) else None, []
        if isinstance(chunk, RunningChunk):
            try:
                outputs = chunk.read()
                ended_s = time.monotonic()
                self.row_rate.add(len(rows), began_s=chunk.began_s, ended_s=ended_s)
                chunk.record_times((active for active, _ in rows), ended_s)
                identity = chunk.identity  # read once: it inspects the whole module
                for active in {active for active, _ in rows}:
                    active.add_identity(identity)
            except BaseException as error:
                failure = self.errors.to_domain_error(rows[0][0], rows[0][1].example_run, error, n_rows=len(rows))
        if failure is None:
            active = rows[0][0]
            active.model.has_fitted(len(rows), active.prepared.shape)
            self._results.fold(rows, outputs)
            return
        # Outside the except clause, so that no traceback keeps the failed pass's tensors alive.
        del chunk
        self._split(rows, failure)

    def _split(self, rows: Sequence[Taken], failure: SidelightError) -> None:
        """Run the rows of a failed chunk again in smaller parts; fail them if there are none."""
        size = self.errors.part_size(rows[0][0].model, len(rows), failure)
        if not size:
            for active, row in rows:
                active.fail(row.example_run, failure)
            return
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            self._collect(part, self._launch(part))
