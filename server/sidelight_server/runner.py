"""The runner: the one thread that owns a device. It takes a chunk at the last moment, runs it, gives the rows back."""

import logging
import threading
from collections.abc import Callable, Sequence

import torch

from .chunk import Explained, explain
from .errors import Internal, ResourceExhausted, SidelightError, Unavailable
from .scheduler import Ring
from .staging import Staging
from .work import Row, Work

log = logging.getLogger("sidelight")


class Runner:
    """The owner of a device, of its ring and of its staging.

    A failing chunk is split until the bad example is alone, and only that one fails. A chunk that does not fit into the
    device's memory is halved, and no larger one is tried again. `on_end` is called when the thread has ended, for
    whatever reason: what is unanswered then will stay so.
    """

    def __init__(
        self, device: torch.device, *, chunk_rows: int, threads: int, on_end: Callable[[], None] = lambda: None
    ) -> None:
        self._device = device
        self._chunk_rows = chunk_rows
        self._threads = threads
        self._on_end = on_end
        self._staging = Staging(device)
        self._ring: Ring[Row] = Ring()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"sidelight-{device}", daemon=True)

    @property
    def chunk_rows(self) -> int:
        """How many rows the device runs at once, at most."""
        return self._chunk_rows

    def start(self) -> None:
        """Begin to run chunks."""
        self._thread.start()

    def submit(self, work: Work) -> None:
        """Let a request join the ring. `Unavailable` unless the runner runs."""
        with self._changed:
            if self._closed or not self._thread.is_alive():
                raise Unavailable("the server is not running, or is shutting down")
            self._ring.add(work)
            self._changed.notify()

    def close(self) -> None:
        """End after the running chunk. Rows that have not run are never answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        # OpenMP keeps the number for each thread, but torch hands it on to threads that begin later: only if need be.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # for tensors that a model's own code makes on "cuda"
        try:
            while (rows := self._take_chunk()) is not None:
                for part in _apart(rows):
                    self._answer(part)
        finally:
            with self._changed:
                self._closed = True
            self._on_end()

    def _take_chunk(self) -> list[Row] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ring))
            return None if self._closed else self._ring.take_chunk(self._chunk_rows)

    def _answer(self, rows: Sequence[Row]) -> None:
        failure: SidelightError | None = None
        try:
            outcomes = explain(rows, self._staging)
            for row in rows:
                row.work.maps()  # memory for the answer is taken here, where its lack is a failure like any other
        # Even SystemExit: a model must not end the thread that all others wait for.
        except BaseException as error:
            failure = self._understand(rows, error)
        if failure is None:
            for row, outcome in zip(rows, outcomes, strict=True):
                if isinstance(outcome, Explained):
                    row.work.give(row, outcome.map, outcome.explanation, outcome.probabilities)
                else:
                    row.work.fail(row, outcome)
            return
        # Past the except clause, where the traceback no longer keeps the failed pass's tensors alive.
        self._split(rows, failure)

    def _understand(self, rows: Sequence[Row], error: BaseException) -> SidelightError:
        """Return what to tell a caller, and tell the log why."""
        name, place = rows[0].work.model.name, rows[0].place
        if _is_out_of_memory(error):
            log.warning('event=out_of_memory model="%s" rows=%d', name, len(rows))
            return ResourceExhausted(f'model "{name}": out of device memory on one example')
        if len(rows) == 1:
            log.error('event=model_failed model="%s" example=%d', name, place, exc_info=error)
        return Internal(f'model "{name}" failed on example {place}; the server\'s log has the cause')

    def _split(self, rows: Sequence[Row], failure: SidelightError) -> None:
        """Fail a row that is alone; else try both halves, and after a lack of memory never more than that."""
        if isinstance(failure, ResourceExhausted) and self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(rows) == 1:
            rows[0].work.fail(rows[0], failure)
            return
        half = len(rows) // 2
        if isinstance(failure, ResourceExhausted):
            self._chunk_rows = min(self._chunk_rows, half)
        self._answer(rows[:half])
        self._answer(rows[half:])


def _apart(rows: list[Row]) -> list[list[Row]]:
    """Return the parts in which rows run: all together, or each alone where the model lets them touch each other."""
    if rows and rows[0].work.model.rows_touch:
        return [[row] for row in rows]
    return [rows] if rows else []


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
