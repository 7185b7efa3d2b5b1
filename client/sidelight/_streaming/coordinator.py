"""The coordinator of a stream: chooses the next message of each worker, and handles responses and ends of calls.

It has no thread of its own; two threads of each server call it. One of gRPC's takes the next message to send, and reads
the caller's next batch if there is no message and the window has room. The worker's own passes on the responses.
"""

import enum
import functools
import logging
import time

from sidelight.v1 import attribution_pb2 as pb

from .._transport.wire import Incoming, Outgoing
from ..exceptions import ResourceExhausted, ServerDied, SidelightError, Unavailable, from_code
from ..results.types import seconds
from .reader import BatchReader
from .requests import StreamConfig
from .scheduling.parts import Part
from .state import StreamState
from .worker import StreamWorker, WorkerCallbacks

log = logging.getLogger("sidelight")

UNAVAILABLE_DELAY_S = 0.1  # until a batch that a server rejected while shutting down is sent again


class Step(enum.Enum):
    """The next step of gRPC's sending thread if it has no part to send."""

    READ = "the caller's next batch"
    REGISTER = "a region of shared memory"
    END = "the call"


class Coordinator(WorkerCallbacks):
    """Implements the workers' decisions on the state of their stream."""

    def __init__(self, state: StreamState, *, config: StreamConfig, reader: BatchReader) -> None:
        self._state = state
        self._config = config
        self._reader = reader
        self._refused: set[StreamWorker] = set()  # those whose server did not accept their last call

    def end(self, error: BaseException | None) -> None:
        with self._state.lock:
            self._state.end(error)

    def wait_until_ready(self, worker: StreamWorker, not_before_s: float) -> bool:
        state = self._state
        connection = worker.connection
        tried: object = self  # the channel's state at the last `connect`; at first a value that is no state
        with state.lock:
            while not state.is_over and worker not in state.leaving:
                left_s, channel_state = not_before_s - time.monotonic(), connection.state
                if connection.is_closed:
                    state.end(Unavailable("the client is closed"))
                elif left_s > 0:
                    state.changed.wait(left_s)
                elif connection.is_ready:
                    return True
                elif channel_state is not tried:
                    connection.connect()
                    tried = channel_state
                else:
                    state.changed.wait()
            if worker in state.leaving:
                state.resend_queue.remove_worker(worker)
                state.changed.notify_all()
        return False

    def call_started(self, worker: StreamWorker) -> None:
        state = self._state
        with state.lock:
            state.availability.mark_live(worker)
            self._refused.discard(worker)
            state.changed.notify_all()

    def next_request(self, worker: StreamWorker, call: object) -> Outgoing | None:
        state = self._state
        while True:
            with state.lock:
                step = self._next(worker, call)
            match step:
                case Part() as part:
                    return self._config.request(part, worker.regions)
                case Step.READ:
                    self._reader.read_next(worker, call)
                case Step.REGISTER if worker.regions:
                    return Outgoing(worker.regions.make())
                case pb.CancelRequest() as cancel:
                    return Outgoing(pb.AttributeStreamRequest(cancel=cancel))
                case _:
                    return None

    def received(self, worker: StreamWorker, incoming: Incoming) -> None:
        """Handle a response. A second response to a part is ignored."""
        state = self._state
        regions, response = worker.regions, incoming.message
        with state.lock:
            part = state.resend_queue.get(response.id, worker)
            if part is None or state.end_if_model_changed(response):
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
                state.queue.put(part.entry, answer)
            return
        with state.lock:
            is_first = state.resend_queue.pop(response.id, worker) is part
            self._free(worker, response.id)
            worker.connection.record_load(answer)
            if is_first:
                state.store_answer(part, answer)
            else:
                state.resend_queue.forget(response.id, worker)

    def call_ended(self, worker: StreamWorker, cause: SidelightError, *, failed: bool, died: bool) -> None:
        state = self._state
        with state.lock:
            if state.is_over:
                state.resend_queue.remove_sent(worker)  # other streams share the server's load
                return
            was_open = worker in state.availability
            if not was_open:
                self._refused.add(worker)
            state.dispatcher.leave(worker)
            state.dispatcher.unblock(worker)
            log.log(
                logging.WARNING if was_open and failed else logging.INFO,
                "%s: the stream's call ended, reconnecting: %s", worker.connection.address, cause,
            )  # fmt: skip
            state.availability.mark_gone(worker, cause, time.monotonic())
            if failed and not self._config.retry:
                for part in state.resend_queue.remove_sent(worker):
                    state.fail(part, cause)
                if self._refused.issuperset(state.workers):
                    state.end(cause)
            for part in state.resend_queue.requeue_after_call_end(worker, died=died):
                state.fail(part, ServerDied(
                    f"{part.entry.label}: two servers ended while it was their only batch ({cause}); "
                    "it is not sent again"
                ))  # fmt: skip
            state.timer_changed.notify()
            state.changed.notify_all()

    # The caller holds the lock.

    def _next(self, worker: StreamWorker, call: object) -> "Part | pb.CancelRequest | Step":
        """Wait for the next part or step of a call."""
        state = self._state
        while not state.is_over and worker.call is call:
            now_s = time.monotonic()
            wait_s = None
            if worker in state.leaving:
                if not state.resend_queue.holds(worker):
                    break
            elif worker in state.availability:
                if step := self._step(worker, now_s):
                    state.dispatcher.leave(worker)
                    if state.dispatcher.has_idle:  # another worker may have work now
                        state.changed.notify_all()
                    return step
                resend_s = state.resend_queue.next_retry_s(now_s)
                wait_s = None if resend_s is None else resend_s - now_s
            state.changed.wait(wait_s)
        state.dispatcher.leave(worker)
        return Step.END

    def _step(self, worker: StreamWorker, now_s: float) -> "Part | pb.CancelRequest | Step | None":
        """Return a worker's next step; None if it has to wait."""
        state = self._state
        if (id_ := state.resend_queue.next_cancel(worker)) is not None:
            return pb.CancelRequest(id=id_)
        state.dispatcher.add_idle(worker)
        if part := state.dispatcher.take(worker, now_s, fits=functools.partial(self._fits, worker)):
            return part
        if worker.regions and worker.regions.is_missing:
            return Step.REGISTER
        if not self._reader.is_reading and state.dispatcher.next_to_read(now_s) is worker:
            self._reader.is_reading = True
            return Step.READ
        return None

    def _fits(self, worker: StreamWorker, part: Part) -> bool:
        """Allocate shared memory for a part, if the worker has any. Returns False if there is no room now."""
        state = self._state
        if worker.regions is None or not len(part.batch):
            return True
        if worker.regions.allocate(part.id, self._config.shared_bytes(part.batch)):
            return True
        state.changed.notify_all()  # another worker may have room
        return False

    def _requeue_if_retryable(self, part: Part, worker: StreamWorker, failure: pb.Failure) -> bool:
        """Requeue a part that was too large, or whose server was full or shutting down. False for other failures."""
        state = self._state
        delay_s = seconds(failure.retry_delay) if failure.HasField("retry_delay") else None
        if failure.code == ResourceExhausted.code and delay_s is None and len(part.batch) > 1:
            log.info("%s: split in two: %s", part.entry.label, failure.message)
            state.resend_queue.requeue_halves(part, worker)
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
        log.info("%s: sent again in %.2g s: %s", part.entry.label, delay_s, failure.message)
        state.resend_queue.requeue(part, worker, not_before_s=not_before_s)
        return True

    def _receive_other(self, worker: StreamWorker, response: pb.AttributeStreamResponse) -> None:
        """Handle a response that belongs to no part: a late one, or one about a region.

        If the server rejects a region, end the stream: there is no inline fallback.
        """
        state = self._state
        regions = worker.regions
        is_final = response.WhichOneof("outcome") != "result" or response.result.final
        if is_final and state.resend_queue.forget(response.id, worker):
            self._free(worker, response.id)
        elif regions is None:
            return
        elif response.WhichOneof("outcome") == "region_registered":
            regions.mark_registered(response.region_registered.region)
            state.dispatcher.unblock(worker)
            state.changed.notify_all()
        elif regions.has_region(response.id):
            state.end(from_code(response.failure.code, response.failure.message))

    def _free(self, worker: StreamWorker, id_: str) -> None:
        """Free a part's shared memory on a worker, and wake the workers that may have work now."""
        state = self._state
        if worker.regions:
            worker.regions.free(id_)
            state.dispatcher.unblock(worker)
        if state.has_work():
            state.changed.notify_all()
