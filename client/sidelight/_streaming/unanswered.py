"""Unanswered parts: which of them wait, which are sent and to which server, and which is sent next.

The module has no threads, no lock and no clock: the caller holds its own lock and passes the time.

A batch is sent as one part, or as several parts if it exceeds a limit. If a server's call ends before it has answered a
part, the part is sent again: it is executed at least once and answered once. The parts that a server held when it died
are suspects, because one of them may have killed it. Each suspect is sent alone. A suspect that was alone on two
servers that died is given up, so that it cannot kill every replica.
"""

import bisect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from .._inputs.images import EncodedBatch
from ..results.attribution import Attribution

MIN_BATCHES = 2  # one is computed while the next is transferred
DEATHS = 2  # of servers, until a part is given up: one death may be a coincidence
# The server fails a batch at its timeout. The client waits this much longer for that answer, then fails it itself.
GRACE_S = 5.0


@dataclass(eq=False, slots=True)
class Entry:
    """A batch that was read, and the answers to its parts."""

    index: int
    batch: EncodedBatch
    deadline_s: float
    n_open: int = 0  # parts without an answer
    answers: dict[int, Attribution] = field(default_factory=dict)  # by the index of the part's first example

    @property
    def id(self) -> str:
        """The batch's id; its position if it has none."""
        return self.batch.id or str(self.index)

    def add_answer(self, start: int, answer: Attribution) -> bool:
        """Store a part's answer. Returns whether all parts are answered."""
        self.answers[start] = answer
        self.n_open -= 1
        return not self.n_open


@dataclass(eq=False, slots=True)
class Part:
    """The examples of a batch that are sent as one message; usually all of them."""

    entry: Entry
    start: int
    batch: EncodedBatch
    not_before_s: float = 0.0  # a full server's retry delay
    is_suspect: bool = False
    n_deaths: int = 0  # of servers that held no other part of this stream

    @property
    def id(self) -> str:
        """The part's id on the wire: the batch's id, and the range of its examples unless it is the whole batch."""
        id_ = self.entry.id
        return id_ if self.is_whole else f"{id_}:{self.start}-{self.start + len(self.batch)}"

    @property
    def is_whole(self) -> bool:
        """Whether it has all examples of its batch."""
        return len(self.batch) == len(self.entry.batch)

    @property
    def position(self) -> tuple[int, int]:
        """Its position in the stream: the batch's index and the first example."""
        return self.entry.index, self.start


class UnansweredParts:
    """The unanswered parts of a stream: those that wait, and those that are sent to a worker.

    A worker stands for one server and may be any hashable value. `window` limits the examples per worker that are
    unanswered, or answered and not yet released; two batches are always allowed. `total_window` limits them over all
    workers; None sets no limit.
    """

    def __init__(self, *, window: int, total_window: int | None = None, n_workers: int = 1) -> None:
        self._window = window
        self._total_window = total_window
        self._n_workers = n_workers
        self._waiting: list[Part] = []  # sorted by position
        self._sent: dict[str, tuple[Part, Hashable]] = {}
        self._n_examples = 0
        self._n_batches = 0
        self._n_undelivered = 0
        self.n_retries = 0  # parts that were enqueued again
        self.is_exhausted = False  # whether the caller's iterator has ended

    @property
    def n_unanswered(self) -> int:
        """The number of parts that wait or are sent."""
        return len(self._waiting) + len(self._sent)

    @property
    def is_done(self) -> bool:
        """Whether all batches have been read and all answers delivered."""
        return self.is_exhausted and not self._n_undelivered

    def add(self, entry: Entry, spans: Sequence[range]) -> None:
        """Enqueue a batch as one part for each range of its examples."""
        entry.n_open = len(spans)
        self._n_examples += len(entry.batch)
        self._n_batches += 1
        self._n_undelivered += 1
        for span in spans:
            self._enqueue(Part(entry, span.start, entry.batch.part(span)))

    def may_read(self, worker: Hashable, now_s: float) -> bool:
        """Return whether a worker may read another batch.

        It may if the window has room, no waiting part could be sent now, and the worker's own share is not used up by
        sent parts and holds no suspect.
        """
        if self.is_exhausted or any(part.not_before_s <= now_s for part in self._waiting):
            return False
        held = self._held_by(worker)
        if any(part.is_suspect for part in held):
            return False
        has_turn = len(held) < MIN_BATCHES or sum(len(part.batch) for part in held) < self._window
        return has_turn and self._has_room()

    def send(self, worker: Hashable, now_s: float, *, fits: Callable[[Part], bool] = lambda _: True) -> Part | None:
        """Return the next part for a worker and mark it sent; None if there is none for it now, or it does not fit."""
        held = self._held_by(worker)
        if any(part.is_suspect for part in held):
            return None
        for place, part in enumerate(self._waiting):
            if part.not_before_s > now_s or part.id in self._sent:  # a caller's batch id may equal a part's id
                continue
            if part.is_suspect and held:  # sent alone: the worker's other parts are answered first
                return None
            if not fits(part):
                return None
            del self._waiting[place]
            self._sent[part.id] = part, worker
            return part
        return None

    def has_id(self, id_: str) -> bool:
        """Return whether an unanswered batch has this id."""
        sent = (part for part, _ in self._sent.values())
        return any(part.entry.id == id_ for part in (*self._waiting, *sent))

    def unused_id(self, index: int) -> str:
        """Return an id that no unanswered batch has, for a batch without one."""
        id_ = str(index)
        while self.has_id(id_):
            id_ += "'"
        return id_

    def get(self, id_: str) -> Part | None:
        """Return a sent part; None if none has this id."""
        part, _ = self._sent.get(id_, (None, None))
        return part

    def pop(self, id_: str) -> Part | None:
        """Remove a sent part. None if it has been answered or given up already, so that no part is answered twice."""
        part, _ = self._sent.pop(id_, (None, None))
        return part

    def requeue(self, part: Part, *, not_before_s: float) -> None:
        """Enqueue a sent part again, to be sent not before a time."""
        del self._sent[part.id]
        part.not_before_s = not_before_s
        self._enqueue(part)
        self.n_retries += 1

    def requeue_halves(self, part: Part) -> None:
        """Enqueue a sent part again as two halves: it was too large for its server."""
        del self._sent[part.id]
        half = len(part.batch) // 2
        for span in (range(half), range(half, len(part.batch))):
            self._enqueue(Part(part.entry, part.start + span.start, part.batch.part(span), is_suspect=part.is_suspect))
        part.entry.n_open += 1

    def remove_sent(self, worker: Hashable) -> list[Part]:
        """Remove and return the parts that were sent to a worker."""
        held = self._held_by(worker)
        for part in held:
            del self._sent[part.id]
        return held

    def requeue_after_call_end(self, worker: Hashable, *, died: bool) -> list[Part]:
        """Enqueue the parts again that were sent to a worker whose call has ended. Returns those that are given up."""
        held = self.remove_sent(worker)
        for part in held:
            if died:
                part.is_suspect = True
                part.n_deaths += len(held) == 1
        given_up = [part for part in held if part.n_deaths >= DEATHS]
        for part in held:
            if part not in given_up:
                self._enqueue(part)
                self.n_retries += 1
        return given_up

    def pop_overdue(self, now_s: float) -> tuple[list[Part], set[Hashable]]:
        """Remove the parts whose time is over. Returns them, and the workers whose servers did not answer sent ones."""
        waiting = [part for part in self._waiting if now_s >= part.entry.deadline_s]
        silent = {id_: each for id_, each in self._sent.items() if now_s >= self._expires_s(each[0])}
        self._waiting = [part for part in self._waiting if part not in waiting]
        for id_ in silent:
            del self._sent[id_]
        return waiting + [part for part, _ in silent.values()], {worker for _, worker in silent.values()}

    def next_deadline_s(self) -> float | None:
        """Return when the next part will be overdue; None if there are no parts."""
        dues_s = [part.entry.deadline_s for part in self._waiting]
        dues_s += [self._expires_s(part) for part, _ in self._sent.values()]
        return min(dues_s, default=None)

    def next_retry_s(self, now_s: float) -> float | None:
        """Return when the first part's retry delay ends; None if no part has one."""
        return min((part.not_before_s for part in self._waiting if part.not_before_s > now_s), default=None)

    def mark_delivered(self) -> None:
        """Record that a batch's answer is in the result queue."""
        self._n_undelivered -= 1

    def release(self, entry: Entry) -> None:
        """Free the window that a batch occupies, once the caller has taken its answer."""
        self._n_batches -= 1
        self._n_examples -= len(entry.batch)

    def _enqueue(self, part: Part) -> None:
        bisect.insort(self._waiting, part, key=lambda each: each.position)

    def _held_by(self, worker: Hashable) -> list[Part]:
        return [part for part, sent_to in self._sent.values() if sent_to == worker]

    def _has_room(self) -> bool:
        if self._total_window is not None:
            return self._n_batches < MIN_BATCHES or self._n_examples < self._total_window
        return self._n_batches < MIN_BATCHES * self._n_workers or self._n_examples < self._window * self._n_workers

    @staticmethod
    def _expires_s(part: Part) -> float:
        return part.entry.deadline_s + GRACE_S
