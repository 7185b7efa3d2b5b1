"""The batch reader: takes the caller's next batch, encodes it, and splits it into parts."""

import contextvars
import logging
import time
from collections.abc import Iterator, Sequence

from .._inputs.batch import Batch, Images
from .._inputs.images import EncodedBatch
from .._options import check_classes
from ..exceptions import InvalidArgument, SidelightError
from .requests import StreamConfig
from .scheduling.parts import Entry
from .state import StreamState
from .worker import StreamWorker

log = logging.getLogger("sidelight")


# A batch that was read, the spans of its parts, and why it cannot be sent, if it cannot.
ReadBatch = tuple[EncodedBatch, Sequence[range], SidelightError | None]


class BatchReader:
    """Reads the caller's batches in gRPC's threads, without the lock; `is_reading` admits one thread at a time."""

    def __init__(
        self, batches: Iterator[Images | Batch | EncodedBatch], *, config: StreamConfig, state: StreamState
    ) -> None:
        self.is_reading = False
        self._batches = batches
        self._config = config
        self._state = state
        self._context = contextvars.copy_context()  # the caller's, for the caller's iterator
        self._n_read = 0
        self._are_classes_checked = False  # of a target that lists one class per example

    def read_next(self, worker: StreamWorker, call: object) -> None:
        """Read and enqueue the next batch, for a worker's call. If it cannot be sent, deliver its error at once."""
        try:
            read = self._read()
        except Exception as error:  # raised by the caller's iterator: passed on to the caller
            with self._state.lock:
                self._state.end(error)
            return
        with self._state.lock:
            self.is_reading = False
            if read is None:
                self._state.resend_queue.is_exhausted = True
                if self._state.resend_queue.is_done:
                    self._state.end(None)
            else:
                self._enqueue(*read)
                if worker in self._state.availability and worker not in self._state.leaving and worker.call is call:
                    self._state.dispatcher.add_idle(worker)
                self._state.changed.notify_all()

    def _enqueue(self, batch: EncodedBatch, spans: Sequence[range], refused: SidelightError | None) -> None:
        state, index = self._state, self._n_read
        self._n_read += 1
        if batch.id is None:
            batch.id = state.resend_queue.unused_id(index)
        elif refused is None and state.resend_queue.has_id(batch.id):
            spans, refused = (), InvalidArgument(f'id: "{batch.id}" is used by a batch that is not answered yet')
        entry = Entry(index, batch, time.monotonic() + self._config.timeout_s)
        state.resend_queue.add(entry, spans)
        if refused is not None:
            state.refuse(entry, refused)
        elif state.resend_queue.n_unanswered == len(spans):  # the timer had no deadline to wait for
            state.timer_changed.notify()

    def _read(self) -> ReadBatch | None:
        """Return the next batch; None after the last. Raises what the caller's iterator raises."""
        try:
            given = self._context.run(next, self._batches)
        except StopIteration:
            return None
        batch: EncodedBatch | None = None
        try:
            batch = given if isinstance(given, EncodedBatch) else EncodedBatch(given)
            self._check_classes(batch)
            spans = self._config.split(batch)
        except (SidelightError, OSError) as error:
            refused = error if isinstance(error, SidelightError) else InvalidArgument(f"images: {error}")
            return _without_images(given) if batch is None else batch, (), refused
        if len(spans) > 1:
            log.info("batch %s: sent in %d parts, over the limits of one message", batch.id or self._n_read, len(spans))
        return batch, spans, None

    def _check_classes(self, batch: EncodedBatch) -> None:
        """Check the length of the call's list of classes against the first batch; later batches may be shorter."""
        if batch.target is None and not self._are_classes_checked:
            self._are_classes_checked = True
            check_classes(self._config.template, batch)


def _without_images(given: object) -> EncodedBatch:
    """Return an empty batch with the id of one that cannot be encoded, so that its error carries the id."""
    batch = EncodedBatch([])
    if isinstance(given, Batch) and isinstance(given.id, str):
        batch.id = given.id
    return batch
