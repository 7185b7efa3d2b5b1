"""The state of a stream, which its threads share under one lock."""

import threading
import time
from collections.abc import Callable, Iterable

from sidelight.v1 import attribution_pb2 as pb

from .._transport.channel import Connection
from ..exceptions import ModelChanged, SidelightError
from ..results.attribution import Attribution, failed
from .availability import Availability
from .merge import merge_parts
from .results_queue import End, ResultQueue
from .scheduling.dispatcher import Dispatcher
from .scheduling.parts import Entry, Part
from .scheduling.resend_queue import ResendQueue
from .worker import StreamWorker


class StreamState:
    """Workers, unanswered parts and answers of a stream. Callers hold the lock; only the first `end` has an effect."""

    def __init__(
        self,
        resend_queue: ResendQueue,
        *,
        queue: ResultQueue,
        addresses: Callable[[], str],
        allow_model_change: bool,
    ) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)  # wakes the workers
        self.timer_changed = threading.Condition(self.lock)
        self.resend_queue = resend_queue
        self.dispatcher = Dispatcher(resend_queue, on_choice=self.changed.notify_all)
        self.availability = Availability(addresses, time.monotonic())
        self.leaving: list[StreamWorker] = []  # those whose server is no longer listed
        self.is_over = False
        self._workers: dict[Connection, StreamWorker] = {}
        self.queue = queue
        self._allow_model_change = allow_model_change
        self._digest = ""  # of the model that answered first

    @property
    def workers(self) -> list[StreamWorker]:
        """The workers whose server is listed."""
        return list(self._workers.values())

    def follow(self, connections: Iterable[Connection], start_worker: Callable[[Connection], StreamWorker]) -> None:
        """Start a worker for each new connection. The worker of a removed one ends once its parts are answered."""
        for gone in set(self._workers).difference(connections):
            worker = self._workers.pop(gone)
            self.leaving.append(worker)
            self.dispatcher.leave(worker)
        for added in connections:
            if added not in self._workers:
                worker = self._workers[added] = start_worker(added)
                self.resend_queue.add_worker(worker, added.load)

    def has_work(self) -> bool:
        """Return whether a worker may have something to do after an answer.

        With one server and a full window, workers wait until the caller takes an answer. Waking them needlessly would
        cost more than reading the answer.
        """
        if len(self._workers) != 1 or self.leaving or self.resend_queue.has_parts:
            return True
        return self.resend_queue.has_room(time.monotonic())

    def end(self, error: BaseException | None) -> None:
        """End the stream, with an error or because all is done."""
        self.is_over = True
        self.queue.close(End(error))
        self.changed.notify_all()
        self.timer_changed.notify()

    def end_if_model_changed(self, response: pb.AttributeStreamResponse) -> bool:
        """End the stream if another model answers than the first time. Returns whether it did."""
        digest = response.result.provenance.model_digest
        if digest and self._digest and digest != self._digest and not self._allow_model_change:
            self.end(ModelChanged(
                f"the model that answers is {digest[:12]}…, the stream began with {self._digest[:12]}…; "
                "set allow_model_change=True to continue"
            ))  # fmt: skip
            return True
        self._digest = self._digest or digest
        return False

    def store_answer(self, part: Part, answer: Attribution) -> None:
        """Store a part's final answer. The last one of a batch delivers the batch's answer."""
        if part.entry.add_answer(part.start, answer):
            self._deliver(part.entry, merge_parts(part.entry))

    def fail(self, part: Part, error: SidelightError) -> None:
        """Store an error as a part's answer."""
        self.store_answer(part, _failed(part.entry, error))

    def refuse(self, entry: Entry, error: SidelightError) -> None:
        """Deliver an error as the answer of a batch that cannot be sent."""
        self._deliver(entry, _failed(entry, error))

    def _deliver(self, entry: Entry, answer: Attribution) -> None:
        self.queue.put(entry, answer)
        self.resend_queue.mark_delivered()
        if self.resend_queue.is_done:
            self.end(None)


def _failed(entry: Entry, error: SidelightError) -> Attribution:
    return failed(error, index=entry.index, id_=entry.id)
