"""The stream: many batches in flight to all servers at once. The failure of one server does not end it.

Threads: for each server, one of gRPC's threads sends parts, and reads the caller's next batch when it has none to send
and the window has room. A worker's thread receives the answers of one server. A timer thread fails batches at their
deadline. The caller's thread takes the answers. They share `UnansweredParts`, under one lock, and `ResultQueue`.
"""

import contextvars
import enum
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.batch import Batch, Images
from .._inputs.images import EncodedBatch
from .._transport.channel import Connection
from .._transport.pool import ConnectionPool
from .._transport.process import Origin, close_at_exit
from .._transport.wire import Incoming, Outgoing
from ..exceptions import (
    DeadlineExceeded,
    InvalidArgument,
    ModelChanged,
    ResourceExhausted,
    ServerDied,
    SidelightError,
    Unavailable,
    from_code,
)
from ..results import attribution
from ..results.attribution import Attribution
from ..results.types import seconds
from .availability import Availability
from .dispatcher import Dispatcher
from .merge import merge_parts
from .parts import Entry, Part
from .reader import BatchReader
from .requests import StreamConfig
from .results_queue import Answered, End, ResultQueue
from .unanswered import UnansweredParts
from .worker import StreamWorker

log = logging.getLogger("sidelight")

UNAVAILABLE_DELAY_S = 0.1  # before a batch is sent again that a server rejected while shutting down


class Step(enum.Enum):
    """What gRPC's sending thread does next if it has no part to send."""

    READ = "the caller's next batch"
    REGISTER = "a region of shared memory"
    CANCEL = "the cancel of a batch that another server has answered"
    END = "the call"


class Stream:
    """Coordinates the caller, the workers and the timer. Only the first call of `end` has an effect."""

    def __init__(
        self,
        pool: ConnectionPool,
        batches: Iterator[Images | Batch | EncodedBatch],
        *,
        config: StreamConfig,
        unanswered: UnansweredParts,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.queue = ResultQueue(on_change=on_change)
        self._reader = BatchReader(batches, config)
        self._config = config
        self._unanswered = unanswered
        self._pool = pool
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._dispatcher = Dispatcher(unanswered, on_choice=self._changed.notify_all)
        self._timer_changed = threading.Condition(self._lock)  # wakes the timer
        # Tracing reads the caller's span from it; the threads of workers start with an empty context.
        self._context = contextvars.copy_context()
        self._workers: dict[Connection, StreamWorker] = {}
        self._leaving: list[StreamWorker] = []  # those whose server is no longer listed
        self._availability = Availability(lambda: pool.addresses, time.monotonic())
        self._refused: set[StreamWorker] = set()  # those whose server did not accept their last call
        self._digest = ""
        self._is_reading = False
        self._is_over = False
        self._is_closed = False
        self._origin = Origin()
        self._timer = threading.Thread(target=self._run_timer, name="sidelight-timer", daemon=True)

    @property
    def n_retries(self) -> int:
        """How many parts were sent again, because their server was full or went away."""
        return self._unanswered.n_retries

    def start(self) -> None:
        """Start the workers and the timer."""
        close_at_exit(self)
        self._pool.listen(self._wake)
        self._wake()
        self._timer.start()

    def close(self) -> None:
        """End the stream, cancel unanswered batches and join the threads. In a forked child it does nothing."""
        if self._is_closed or not self._origin.is_in_own_process:
            return
        self._pool.unlisten(self._wake)
        self.end(None)
        with self._lock:
            workers = [*self._workers.values(), *self._leaving]
        for worker in workers:
            worker.stop()
        for worker in workers:
            worker.join()
        self._timer.join()
        self._is_closed = True

    def wait(self) -> Answered | End:
        """Wait for an answer; return the end once all are taken. Raises `FailedPrecondition` in a forked child."""
        self._origin.check()
        return self.queue.wait()

    def release(self, entry: Entry) -> None:
        """Free the window that a batch occupies, once the caller has taken its final answer."""
        self._origin.check()
        with self._lock:
            self._unanswered.release(entry)
            self._changed.notify_all()

    def end(self, error: BaseException | None) -> None:
        """End the stream, with an error or because all is done."""
        with self._lock:
            self._end(error)

    # StreamCoordinator: called by the workers.

    def wait_until_ready(self, worker: StreamWorker, not_before_s: float) -> bool:
        """Wait until `not_before_s` and until the server is connected.

        Returns False once the stream is over or the server is no longer listed.
        """
        connection = worker.connection
        sought: object = self  # the channel state in which `connect` was called last; at first none
        with self._lock:
            while not self._is_over and worker not in self._leaving:
                left_s, state = not_before_s - time.monotonic(), connection.state
                if connection.is_closed:
                    self._end(Unavailable("the client is closed"))
                elif left_s > 0:
                    self._changed.wait(left_s)
                elif connection.is_ready:
                    return True
                elif state is not sought:
                    connection.connect()
                    sought = state
                else:
                    self._changed.wait()
            if worker in self._leaving:
                self._unanswered.remove_worker(worker)
                self._changed.notify_all()
        return False

    def call_started(self, worker: StreamWorker) -> None:
        """Record that the server has accepted the call."""
        with self._lock:
            self._availability.mark_live(worker)
            self._refused.discard(worker)
            self._changed.notify_all()

    def next_request(self, worker: StreamWorker, call: object) -> Outgoing | None:
        """Wait for the next message to send; None once the call or the stream is over."""
        while True:
            with self._lock:
                step = self._next(worker, call)
            match step:
                case Part() as part:
                    return self._config.request(part, worker.regions)
                case Step.READ:
                    self._read(worker, call)
                case Step.REGISTER if worker.regions:
                    return Outgoing(worker.regions.make())
                case pb.CancelRequest() as cancel:
                    return Outgoing(pb.AttributeStreamRequest(cancel=cancel))
                case _:
                    return None

    def received(self, worker: StreamWorker, incoming: Incoming) -> None:
        """Handle a response. One to a part that has been answered already is ignored."""
        regions, response = worker.regions, incoming.message
        with self._lock:
            part = self._unanswered.get(response.id, worker)
            if part is None or self._end_if_model_changed(response):
                self._receive_other(worker, response)
                return
            if response.WhichOneof("outcome") == "failure" and self._requeue_if_retryable(
                part, worker, response.failure
            ):
                self._free(worker, response.id)
                return
        answer = self._config.answer(incoming, part, regions)
        if not answer.final:
            if part.is_whole:  # the maps of a batch's other parts would be missing
                self.queue.put(part.entry, answer)
            return
        with self._lock:
            is_first = self._unanswered.pop(response.id, worker) is part
            self._free(worker, response.id)
            worker.connection.told(answer)
            if is_first:
                self._store_answer(part, answer)
            else:
                self._unanswered.forget(response.id, worker)

    def call_ended(self, worker: StreamWorker, cause: SidelightError, *, failed: bool, died: bool) -> None:
        """Requeue a worker's parts after its call has ended.

        `died` says whether the server may have died, and one of these parts may be the cause.
        """
        with self._lock:
            if self._is_over:
                self._unanswered.remove_sent(worker)  # other streams share the server's load
                return
            was_open = worker in self._availability
            if not was_open:
                self._refused.add(worker)
            self._dispatcher.leave(worker)
            self._dispatcher.unblock(worker)
            log.log(
                logging.WARNING if was_open and failed else logging.INFO,
                "%s: the stream's call ended, reconnecting: %s", worker.connection.address, cause,
            )  # fmt: skip
            self._availability.mark_gone(worker, cause, time.monotonic())
            if failed and not self._config.retry:
                for part in self._unanswered.remove_sent(worker):
                    self._fail(part, cause)
                if self._refused.issuperset(self._workers.values()):
                    self._end(cause)
            for part in self._unanswered.requeue_after_call_end(worker, died=died):
                self._fail(part, ServerDied(
                    f"{_label(part)}: two servers ended while it was their only batch ({cause}); it is not sent again"
                ))  # fmt: skip
            self._timer_changed.notify()
            self._changed.notify_all()

    # The caller holds the lock.

    def _next(self, worker: StreamWorker, call: object) -> "Part | pb.CancelRequest | Step":
        """Wait for the next part or step of a call."""
        while not self._is_over and worker.call is call:
            now_s = time.monotonic()
            wait_s = None
            if worker in self._leaving:
                if not self._unanswered.holds(worker):
                    break
            elif worker in self._availability:
                if step := self._step(worker, now_s):
                    self._dispatcher.leave(worker)
                    if self._dispatcher.has_idle:  # another one may have its turn now
                        self._changed.notify_all()
                    return step
                resend_s = self._unanswered.next_retry_s(now_s)
                wait_s = None if resend_s is None else resend_s - now_s
            self._changed.wait(wait_s)
        self._dispatcher.leave(worker)
        return Step.END

    def _step(self, worker: StreamWorker, now_s: float) -> "Part | pb.CancelRequest | Step | None":
        """Return what a worker does now; None if it has to wait."""
        if (id_ := self._unanswered.next_cancel(worker)) is not None:
            return pb.CancelRequest(id=id_)
        self._dispatcher.ask(worker)
        if part := self._dispatcher.take(worker, now_s, fits=functools.partial(self._fits, worker)):
            return part
        if worker.regions and worker.regions.is_missing:
            return Step.REGISTER
        if not self._is_reading and self._dispatcher.next_to_read(now_s) is worker:
            self._is_reading = True
            return Step.READ
        return None

    def _fits(self, worker: StreamWorker, part: Part) -> bool:
        """Allocate shared memory for a part, if the worker has any. Returns False if there is no room now."""
        if worker.regions is None or not len(part.batch):
            return True
        if worker.regions.allocate(part.id, self._config.shared_bytes(part.batch)):
            return True
        self._changed.notify_all()  # another worker may have room
        return False

    def _requeue_if_retryable(self, part: Part, worker: StreamWorker, failure: pb.Failure) -> bool:
        """Requeue a part that was too large, or whose server was full or shutting down. Returns whether it did."""
        delay_s = seconds(failure.retry_delay) if failure.HasField("retry_delay") else None
        if failure.code == ResourceExhausted.code and delay_s is None and len(part.batch) > 1:
            log.info("%s: split in two: %s", _label(part), failure.message)
            self._unanswered.requeue_halves(part, worker)
            return True
        if not self._config.retry:
            return False
        if failure.code == Unavailable.code:
            delay_s = delay_s or UNAVAILABLE_DELAY_S
        elif failure.code != ResourceExhausted.code:
            return False
        not_before_s = time.monotonic() + (delay_s or 0.0)
        if delay_s is None or not_before_s >= part.entry.deadline_s:
            return False
        log.info("%s: sent again in %.2g s: %s", _label(part), delay_s, failure.message)
        self._unanswered.requeue(part, worker, not_before_s=not_before_s)
        return True

    def _receive_other(self, worker: StreamWorker, response: pb.AttributeStreamResponse) -> None:
        """Handle a response to no part: one that came late, or one about a region.

        If the server rejects a region, end the stream: there is no inline fallback.
        """
        regions = worker.regions
        is_final = response.WhichOneof("outcome") != "result" or response.result.final
        if is_final and self._unanswered.forget(response.id, worker):
            self._free(worker, response.id)
        elif regions is None:
            return
        elif response.WhichOneof("outcome") == "region_registered":
            regions.mark_registered(response.region_registered.region)
            self._dispatcher.unblock(worker)
            self._changed.notify_all()
        elif regions.holds(response.id):
            self._end(from_code(response.failure.code, response.failure.message))

    def _free(self, worker: StreamWorker, id_: str) -> None:
        """Free what a part held of a worker's shared memory, and wake whoever waits for a part or room."""
        if worker.regions:
            worker.regions.free(id_)
            self._dispatcher.unblock(worker)
        self._changed.notify_all()

    def _end_if_model_changed(self, response: pb.AttributeStreamResponse) -> bool:
        """End the stream if another model answers than the first time. Returns whether it did."""
        digest = response.result.provenance.model_digest
        if digest and self._digest and digest != self._digest and not self._config.allow_model_change:
            self._end(ModelChanged(
                f"the model that answers is {digest[:12]}…, the stream began with {self._digest[:12]}…; "
                "set allow_model_change=True to continue"
            ))  # fmt: skip
            return True
        self._digest = self._digest or digest
        return False

    def _store_answer(self, part: Part, answer: Attribution) -> None:
        if part.entry.add_answer(part.start, answer):
            self._deliver(part.entry, merge_parts(part.entry))

    def _fail(self, part: Part, error: SidelightError) -> None:
        self._store_answer(part, attribution.failed(error, index=part.entry.index, id_=part.entry.id))

    def _deliver(self, entry: Entry, answer: Attribution) -> None:
        self.queue.put(entry, answer)
        self._unanswered.mark_delivered()
        if self._unanswered.is_done:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        self._is_over = True
        self.queue.close(End(error))
        self._changed.notify_all()
        self._timer_changed.notify()

    def _wake(self) -> None:
        """Follow the pool: its connections, and their states. Called by threads of the pool and of gRPC."""
        with self._lock:
            if not self._is_over:
                connections = self._pool.connections
                for gone in set(self._workers).difference(connections):
                    worker = self._workers.pop(gone)
                    self._leaving.append(worker)
                    self._dispatcher.leave(worker)
                for added in connections:
                    if added not in self._workers:
                        self._add_worker(added)
            self._changed.notify_all()

    def _add_worker(self, connection: Connection) -> None:
        worker = self._workers[connection] = StreamWorker(
            connection,
            self,
            max_message_bytes=self._config.max_message_bytes,
            make_regions=self._config.make_regions,
            metadata=self._config.metadata,
            context=self._context.copy(),
        )
        self._unanswered.add_worker(worker, connection.load)
        worker.start()

    # Called by gRPC's sending threads without the lock. `_is_reading` lets one thread at a time read.

    def _read(self, worker: StreamWorker, call: object) -> None:
        """Read and enqueue the caller's next batch. If it cannot be sent, deliver its error at once."""
        try:
            read = self._reader.read()
        except Exception as error:  # raised by the caller's iterator: passed on to the caller
            self.end(error)
            return
        if read is None:
            self._exhausted()
            return
        batch, spans, refused = read.batch, read.spans, read.refused
        with self._lock:
            if batch.id is None:
                batch.id = self._unanswered.unused_id(read.index)
            elif refused is None and self._unanswered.has_id(batch.id):
                spans, refused = (), InvalidArgument(f'id: "{batch.id}" is used by a batch that is not answered yet')
            entry = Entry(read.index, batch, time.monotonic() + self._config.timeout_s)
            self._is_reading = False
            self._unanswered.add(entry, spans)
            if worker in self._availability and worker not in self._leaving and worker.call is call:
                self._dispatcher.ask(worker)
            if refused is not None:
                self._deliver(entry, attribution.failed(refused, index=entry.index, id_=entry.id))
            elif self._unanswered.n_unanswered == len(spans):  # the timer had no deadline to wait for
                self._timer_changed.notify()
            self._changed.notify_all()

    def _exhausted(self) -> None:
        with self._lock:
            self._is_reading = False
            self._unanswered.is_exhausted = True
            if self._unanswered.is_done:
                self._end(None)

    # The timer's thread, which sleeps until the next deadline.

    def _run_timer(self) -> None:
        with self._lock:
            while not self._is_over:
                now_s = time.monotonic()
                due_s = self._expire(now_s)
                self._timer_changed.wait(None if due_s is None else min(max(0.0, due_s - now_s), threading.TIMEOUT_MAX))

    def _expire(self, now_s: float) -> float | None:
        """Fail overdue parts, and end a stream that has had no server for too long. Returns the next deadline."""
        late, silent = self._unanswered.pop_overdue(now_s)
        for part in late:
            self._fail(part, self._timeout_error(part))
        for worker in [*self._workers.values(), *self._leaving]:
            if worker in silent:
                worker.cancel(Unavailable("the server did not answer within a batch's timeout"))
        if late:
            self._changed.notify_all()
        dues_s = [self._unanswered.next_deadline_s(), self._availability.log_waiting(now_s)]
        server_wait_s = self._config.server_wait_s
        if not self._unanswered.n_unanswered and (ends_s := self._availability.gives_up_s(server_wait_s)) is not None:
            if now_s >= ends_s:
                self._end(self._availability.error(f"for {server_wait_s:g} s"))
            dues_s.append(ends_s)
        return min((due_s for due_s in dues_s if due_s is not None), default=None)

    def _timeout_error(self, part: Part) -> SidelightError:
        if self._availability:
            return DeadlineExceeded(f"{_label(part)}: the server did not answer within its timeout")
        return self._availability.error(f"{_label(part)}: until its timeout")


def _label(part: Part) -> str:
    return f"batch {part.entry.id}"
