"""The stream: many batches in flight to all servers at once. The failure of one server does not end it.

These threads share `StreamState` and `ResultQueue`: for each server, one of gRPC's sends and one of the worker
receives; a timer expires batches; the caller's thread takes the answers.
"""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator

from .._inputs.batch import Batch, Images
from .._inputs.images import EncodedBatch
from .._transport.channel import Connection
from .._transport.pool import ConnectionPool
from .._transport.process import Origin, close_at_exit
from ..exceptions import DeadlineExceeded, SidelightError, Unavailable
from .coordinator import Coordinator
from .reader import BatchReader
from .requests import StreamConfig
from .results_queue import Answered, End, ResultQueue
from .scheduling.parts import Entry, Part
from .scheduling.resend_queue import ResendQueue
from .state import StreamState
from .worker import StreamWorker


class Stream:
    """Starts and ends the threads of a stream, and hands its answers to the caller."""

    def __init__(
        self,
        pool: ConnectionPool,
        batches: Iterator[Images | Batch | EncodedBatch],
        *,
        config: StreamConfig,
        resend_queue: ResendQueue,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.queue = ResultQueue(on_change=on_change)
        self._config = config
        self._pool = pool
        self._state = StreamState(
            resend_queue,
            queue=self.queue,
            addresses=lambda: pool.addresses,
            allow_model_change=config.allow_model_change,
        )
        reader = BatchReader(batches, config=config, state=self._state)
        self._coordinator = Coordinator(self._state, config=config, reader=reader)
        # Tracing reads the caller's span from it; the threads of workers start with an empty context.
        self._context = contextvars.copy_context()
        self._is_closed = False
        self._origin = Origin()
        self._timer = threading.Thread(target=self._run_timer, name="sidelight-timer", daemon=True)

    @property
    def n_retries(self) -> int:
        """How many parts were sent again, because their server was full or went away."""
        return self._state.resend_queue.n_retries

    def start(self) -> None:
        close_at_exit(self)
        self._pool.listen(self._follow_pool)
        self._follow_pool()
        self._timer.start()

    def close(self) -> None:
        """End the stream, cancel unanswered batches and join the threads. In a forked child it does nothing."""
        if self._is_closed or not self._origin.is_in_own_process:
            return
        self._pool.unlisten(self._follow_pool)
        with self._state.lock:
            self._state.end(None)
            workers = [*self._state.workers, *self._state.leaving]
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
        with self._state.lock:
            self._state.resend_queue.release(entry)
            self._state.changed.notify_all()

    def _follow_pool(self) -> None:
        """Follow the pool's connections and their states. Called by threads of the pool and of gRPC."""
        with self._state.lock:
            if not self._state.is_over:
                self._state.follow(self._pool.connections, self._start_worker)
            self._state.changed.notify_all()

    def _start_worker(self, connection: Connection) -> StreamWorker:
        worker = StreamWorker(
            connection,
            self._coordinator,
            max_message_bytes=self._config.max_message_bytes,
            make_regions=self._config.make_regions,
            metadata=self._config.metadata,
            context=self._context.copy(),
        )
        worker.start()
        return worker

    # The timer's thread, which sleeps until the next deadline.

    def _run_timer(self) -> None:
        with self._state.lock:
            while not self._state.is_over:
                now_s = time.monotonic()
                due_s = self._expire(now_s)
                wait_s = None if due_s is None else min(max(0.0, due_s - now_s), threading.TIMEOUT_MAX)
                self._state.timer_changed.wait(wait_s)

    def _expire(self, now_s: float) -> float | None:
        """Fail overdue parts, and end a stream that has had no server for too long. Returns the next deadline."""
        state = self._state
        late, silent = state.resend_queue.pop_overdue(now_s)
        for part in late:
            state.fail(part, self._timeout_error(part))
        for worker in [*state.workers, *state.leaving]:
            if worker in silent:
                worker.cancel(Unavailable("the server did not answer within a batch's timeout"))
        if late:
            state.changed.notify_all()
        dues_s = [state.resend_queue.next_deadline_s(), state.availability.log_waiting(now_s)]
        server_wait_s = self._config.server_wait_s
        if not state.resend_queue.n_unanswered and (ends_s := state.availability.deadline_s(server_wait_s)) is not None:
            if now_s >= ends_s:
                state.end(state.availability.error(f"for {server_wait_s:g} s"))
            dues_s.append(ends_s)
        return min((due_s for due_s in dues_s if due_s is not None), default=None)

    def _timeout_error(self, part: Part) -> SidelightError:
        availability = self._state.availability
        if availability:
            return DeadlineExceeded(f"{part.entry.label}: the server did not answer within its timeout")
        return availability.error(f"{part.entry.label}: until its timeout")
