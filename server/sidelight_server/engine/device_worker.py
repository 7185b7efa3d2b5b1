"""The device worker: the one thread that owns a device. It takes chunks, runs them, and hands results back."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from ..compute.saved_memory import TooLarge
from ..compute.staging import Staging, is_finite
from ..compute.torch_device import check_works, is_out_of_memory
from ..errors import (
    FailedPrecondition,
    Internal,
    InvalidArgument,
    OutputsError,
    ResourceExhausted,
    SidelightError,
    Unavailable,
)
from ..methods.method import RowOutput
from ..telemetry.call_record import MAX_CHUNKS, ChunkTimes
from ..telemetry.cancellation_latency import CancellationLatency
from ..telemetry.histogram import Histogram
from ..telemetry.logs import Event, Throttle
from .active_request import ActiveRequest
from .chunk import Chunk, to_host
from .example_run import ExampleRun, Result, Row
from .heartbeat import Heartbeat
from .scheduler import Ring

log = logging.getLogger("sidelight")

CHUNK_ROWS = tuple(2**power for power in range(13))  # bounds of a histogram

Taken = tuple[ActiveRequest, Row]
_Flight = tuple[list[Taken], Chunk | SidelightError]
_Value = TypeVar("_Value")


class DeviceLostError(Exception):
    """The device does nothing more for this process, as CUDA has it after an illegal access to memory."""


class DeviceWorker:
    """The owner of a device, of its ring and of its staging.

    At most `depth` chunks are at the device. A failing chunk is split until the bad example is alone, and only that one
    fails. A chunk that does not fit into the device's memory is halved, and no larger one is tried for a while: see
    `RowLimit`. One that is filled up to a number of rows, for the same bytes beside any neighbors, fails. After an
    error that is not foreseen the device is checked, by `check`; if it fails, the device is lost, and the thread ends.
    `on_end` is called when the thread has ended, for whatever reason: what is unanswered then will stay so.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        threads: int,
        depth: int = 0,
        stuck_s: float = 0.0,
        on_end: Callable[[], None] = lambda: None,
        check: Callable[[torch.device], None] = check_works,
    ) -> None:
        self.check = check
        # Why the device is lost, if it is. Its traceback keeps the tensors of the failed pass alive: to give memory
        # back to a device in that state may abort the process.
        self.loss: DeviceLostError | None = None
        self._device = device
        self._threads = threads
        # A GPU computes one chunk while the host reads the one before; a CPU would only have taken its rows too early.
        self._depth = depth or (2 if device.type == "cuda" else 1)
        self._on_end = on_end
        self._staging = Staging(device)
        self._ring: Ring[Taken] = Ring()
        self._tasks: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._flying: deque[_Flight] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"sidelight-{device}", daemon=True)
        self.stops = CancellationLatency()
        self.chunk_rows = Histogram(CHUNK_ROWS)
        self.n_out_of_memory = 0  # chunks
        self.heartbeat = Heartbeat(stuck_s=stuck_s)
        self._faults = Throttle()  # of models: each example of a batch may have one
        self.tells_causes = False  # of what a model raised, to callers: else the log alone has them

    def start(self) -> None:
        """Begin to run chunks."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests can be submitted."""
        return not self._closed and self._thread.is_alive()

    def submit(self, active: ActiveRequest) -> None:
        """Let a request join the ring. `Unavailable` unless the worker runs."""
        with self._changed:
            self._refuse_if_ended()
            self._ring.add(active)
            self._changed.notify()

    def withdraw(self, active: ActiveRequest) -> None:
        """Drop what a request has not run, and let go of what it holds once its rows are off the device."""
        active.cancel()
        with self._changed:
            self._ring.remove(active)
            if not active.n_running:
                active.release()

    def call(self, task: Callable[[], _Value]) -> "Future[_Value]":
        """Run a function on the thread that owns the device, between two chunks. `Unavailable` as for `submit`.

        It waits for the chunks that are at the device, and no other is begun before it. A future that is cancelled
        before its turn does not run.
        """
        future: Future[_Value] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)
                self._check_device(error)

        with self._changed:
            self._refuse_if_ended()
            self._tasks.append((run, future))
            self._changed.notify()
        return future

    def close(self, within_s: float | None = None) -> bool:
        """End after the running chunk; False where that has not ended in time. Rows that have not run never will."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(within_s)
        return not self._thread.is_alive()

    def _refuse_if_ended(self) -> None:
        if not self.is_alive:
            raise self.unavailable("the server is not running, or is shutting down")

    def unavailable(self, otherwise: str) -> Unavailable:
        """Return what to tell a caller once the thread has ended: that the device is lost, or something else."""
        return Unavailable(f"the server's device {self._device} has failed" if self.loss else otherwise)

    def _run(self) -> None:
        # OpenMP keeps the number for each thread, but torch hands it on to threads that begin later: only if need be.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # for tensors that a model's own code makes on "cuda"
        try:
            while self._step():
                pass
        except DeviceLostError as lost:
            self.loss = lost
            log.critical(Event("device_lost", device=self._device, message=str(lost)), exc_info=lost.__cause__)
        finally:
            self.heartbeat.rest(counts=False)  # it has ended, and is not stuck
            with self._changed:
                self._closed = True
            for _, future in self._tasks:  # whoever waits for one would wait for ever
                if future.set_running_or_notify_cancel():
                    future.set_exception(self.unavailable("the server is shutting down"))
            self._on_end()

    def _step(self) -> bool:
        """Run a chunk. It is a function of its own so that nothing of the last one is held while there is no next."""
        rows = self._take_chunk()
        if rows is None:
            return False
        if rows:
            self._flying.append((rows, self._launch(rows)))
        # With nothing to add, what flies is read to the end: it may have more rows to give.
        while len(self._flying) >= (self._depth if rows else 1):
            self._complete(*self._flying.popleft())
        return True

    def _take_chunk(self) -> list[Taken] | None:
        """Return the next rows, after waiting for some unless others fly; None once closed.

        Also none while a function waits for those that fly: with new ones beside them it might wait for ever.
        """
        with self._changed:
            if not (self._flying or self._tasks or len(self._ring)):
                self.heartbeat.rest()
            self._changed.wait_for(lambda: self._closed or self._flying or self._tasks or len(self._ring))
            if self._closed:
                return None
            if self._tasks and self._flying:
                return []
            task = self._tasks.popleft() if self._tasks else None
            head = self._ring.head()
            if task is None and isinstance(head, ActiveRequest):
                return self._ring.take_chunk(head.most_at_once)
        if task is not None:
            self.heartbeat.beat()
            task[0]()
            self.heartbeat.rest(counts=False)  # a measurement is many chunks, or a compiler at work
        return []

    def _launch(self, rows: Sequence[Taken]) -> Chunk | SidelightError:
        self.heartbeat.beat()
        self.chunk_rows.add(len(rows))
        try:
            return Chunk(rows, self._staging)
        # Even SystemExit: a model must not end the thread that all others wait for.
        except BaseException as error:
            return self._to_domain_error(rows[0][0], rows[0][1].example_run, error, n_rows=len(rows))

    def _complete(self, rows: list[Taken], chunk: Chunk | SidelightError) -> None:
        """Give a chunk's rows back; those that come of them join the ring."""
        active_requests = list(dict.fromkeys(active for active, _ in rows))
        had_none = [active for active in active_requests if not active.pending]
        self._read(rows, chunk)
        with self._changed:
            for active, _ in rows:
                active.n_running -= 1
            for active in active_requests:
                if active.cancelled and not active.n_running:
                    if active.cancelled_s is not None:
                        self.stops.add(time.monotonic() - active.cancelled_s)
                    active.release()
                elif active in had_none and not active.cancelled:
                    self._ring.add(active)
                elif not active.pending:  # those it had were of an example that failed
                    self._ring.remove(active)

    def _read(self, rows: Sequence[Taken], chunk: Chunk | SidelightError) -> None:
        failure, outputs = chunk if isinstance(chunk, SidelightError) else None, []
        if isinstance(chunk, Chunk):
            try:
                outputs = chunk.read()
                _tell(rows, chunk)
                identity = chunk.identity  # once: it looks through the module
                for active in {active for active, _ in rows}:
                    active.is_computed_by(identity)
            except BaseException as error:
                failure = self._to_domain_error(rows[0][0], rows[0][1].example_run, error, n_rows=len(rows))
        if failure is None:
            active = rows[0][0]
            active.model.has_fitted(len(rows), active.prepared.shape)
            self._fold(rows, outputs)
            return
        # Past the except clause, where the traceback no longer keeps the failed pass's tensors alive.
        del chunk
        self._split(rows, failure)

    def _fold(self, rows: Sequence[Taken], outputs: Sequence[RowOutput]) -> None:
        """Fold what rows gave, row by row in their order, and store the results of examples that have one."""
        said: dict[ExampleRun, tuple[ActiveRequest, Result]] = {}
        for (active, row), output in zip(rows, outputs, strict=True):
            if active.cancelled:
                continue
            try:
                row.example_run.give(row, output)
            except BaseException as error:
                active.fail(row.example_run, self._to_domain_error(active, row.example_run, error))
                continue
            if row.example_run.result is not None:
                said[row.example_run] = active, row.example_run.result
                row.example_run.result = None
        try:
            self._store_results(said)
        except BaseException as error:  # no memory for the answers
            for example_run, (active, _) in said.items():
                active.fail(example_run, self._to_domain_error(active, example_run, error))

    def _store_results(self, said: dict[ExampleRun, tuple[ActiveRequest, Result]]) -> None:
        maps = to_host([result for _, result in said.values()], self._staging)
        for (example_run, (active, result)), map_ in zip(said.items(), maps, strict=True):
            if not is_finite(map_):
                active.fail(example_run, self._to_domain_error(active, example_run, example_run.not_finite()))
                continue
            probabilities = result.probabilities.float().cpu().numpy() if active.request.probabilities else None
            active.store_result(example_run, map_, result, probabilities)

    def _to_domain_error(
        self, active: ActiveRequest, example_run: ExampleRun, error: BaseException, *, n_rows: int = 1
    ) -> SidelightError:
        """Return what to tell a caller, and tell the log why. `DeviceLostError` where the device is lost."""
        name, place = active.model.name, example_run.place
        if isinstance(error, SidelightError):
            if isinstance(error, Internal | OutputsError) and n_rows == 1:
                self._faults.log(
                    logging.ERROR,
                    Event("model_failed", model=name, id=active.id, example=place, message=error.message),
                )
            if isinstance(error, TooLarge) and not error.fitting:
                self._faults.log(
                    logging.WARNING, Event("too_large", model=name, id=active.id, example=place, message=error.message)
                )
            return FailedPrecondition(f'model "{name}": {error.message}') if isinstance(error, OutputsError) else error
        if is_out_of_memory(error):
            self.n_out_of_memory += 1
            filled = active.model.padded_rows
            whose = {"id": active.id, "example": place} if n_rows == 1 else {}  # a chunk of several is tried again
            self._faults.log(logging.WARNING, Event("out_of_memory", model=name, rows=max(n_rows, filled), **whose))
            what = f"{filled} rows, which it always runs at once (reproducible_rows)" if filled > 1 else "one example"
            return ResourceExhausted(f'model "{name}": out of device memory on {what}')
        self._check_device(error)
        shape, said = active.prepared.shape, f"{type(error).__name__}: {error}"
        if not active.model.takes(shape):
            if n_rows == 1:
                said = said.partition("\n")[0]
                cause = None if active.model.has_run else error  # which may be the model's
                self._faults.log(
                    logging.WARNING, Event("shape_failed", model=name, id=active.id, shape=shape, message=said), cause
                )
            return InvalidArgument(
                f'images: model "{name}", which has no fixed input size, fails on [C, H, W] = {list(shape)}, '
                "and has run on no example of that shape" + (f": {said}" if self.tells_causes else "")
            )
        if n_rows == 1:
            self._faults.log(logging.ERROR, Event("model_failed", model=name, id=active.id, example=place), error)
        if self.tells_causes:
            return Internal(f'model "{name}" failed on example {place}: {said}')
        return Internal(f'model "{name}" failed on example {place}; the server\'s log has the cause')

    def _check_device(self, error: BaseException) -> None:
        """Raise `DeviceLostError` where the device does nothing more, after an error that nobody foresaw."""
        for is_last in (False, True):  # the first check may be told of the same error again, and the device go on
            try:
                self.check(self._device)
                return
            except BaseException as failure:
                if is_out_of_memory(failure):
                    return
                if is_last:
                    raise DeviceLostError(str(failure).partition("\n")[0]) from error

    def _split(self, rows: Sequence[Taken], failure: SidelightError) -> None:
        """Fail a row that is alone; else try both halves, which for a while is the most where memory lacks."""
        if isinstance(failure, TooLarge):
            self._split_to_fit(rows, failure)
            return
        lacks_memory = isinstance(failure, ResourceExhausted)
        if lacks_memory and self._device.type == "cuda":
            torch.cuda.empty_cache()
        model = rows[0][0].model
        if len(rows) == 1 or (lacks_memory and model.padded_rows):  # a half would be filled up to as many rows again
            for active, row in rows:
                active.fail(row.example_run, failure)
            return
        half = len(rows) // 2
        if lacks_memory:
            model.lacks_memory(above=half)
        for part in (rows[:half], rows[half:]):
            self._read(part, self._launch(part))

    def _split_to_fit(self, rows: Sequence[Taken], failure: TooLarge) -> None:
        """Run rows in chunks as large as there is memory for; fail them where that is none. All have one shape."""
        size = failure.fitting
        if not size:
            for active, row in rows:
                active.fail(row.example_run, failure)
        for start in range(0, len(rows), size) if size else ():
            part = rows[start : start + size]
            self._read(part, self._launch(part))


def _tell(rows: Sequence[Taken], chunk: Chunk) -> None:
    """Tell the requests that want to know when their rows ran. Before they are answered: then it is too late."""
    asking = {id(active.chunks): active.chunks for active, _ in rows if active.chunks is not None}
    for chunks in asking.values():
        if len(chunks) < MAX_CHUNKS:
            chunks.append(ChunkTimes(chunk.began_s, time.monotonic(), len(rows)))
