"""Batches in flight: which parts are unanswered, which server has them, and what may be sent next.

It has neither threads nor a clock: whoever holds it has the lock, and says what time it is.

A batch is sent as one part, or as several where it exceeds a limit. A part is sent again when its server ended before
it answered: executed at least once, answered once. The parts that a server held when it died are suspects, for one of
them may have killed it: each of them is sent alone, and one that was alone with two dying servers is given up, so that
it cannot kill every replica in turn.
"""

import bisect
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from .._inputs.images import EncodedBatch
from ..results.attribution import Attribution

MIN_BATCHES = 2  # one at the device, one on its way
DEATHS = 2  # that a part may cause: once may be chance
# The server ends a batch at its timeout and says so; only if that word does not come either, the client ends it.
GRACE_S = 5.0


@dataclass(eq=False, slots=True)
class Entry:
    """A batch that was read, and what has come of its parts."""

    index: int
    batch: EncodedBatch
    deadline_s: float
    n_open: int = 0  # parts without an answer
    answers: dict[int, Attribution] = field(default_factory=dict)  # of the parts, by their first example

    @property
    def id(self) -> str:
        """The batch's id, or if it has none its position."""
        return self.batch.id or str(self.index)

    def add_answer(self, start: int, answer: Attribution) -> bool:
        """Take a part's answer in. Returns whether it was the last."""
        self.answers[start] = answer
        self.n_open -= 1
        return not self.n_open


@dataclass(eq=False, slots=True)
class Part:
    """Some examples of a batch, mostly all of them: what is sent as one message."""

    entry: Entry
    start: int
    batch: EncodedBatch
    not_before_s: float = 0.0  # a server that was full said how long to wait
    is_suspect: bool = False
    n_deaths: int = 0  # of servers that had nothing else of this stream

    @property
    def id(self) -> str:
        """The part's id on the wire: its batch's, with the span of its examples where it is not the whole batch."""
        id_ = self.entry.id
        return id_ if self.is_whole else f"{id_}:{self.start}-{self.start + len(self.batch)}"

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its batch."""
        return len(self.batch) == len(self.entry.batch)

    @property
    def position(self) -> tuple[int, int]:
        """Where it stands in the stream."""
        return self.entry.index, self.start


class UnansweredParts:
    """The unanswered parts of a stream. A worker, one server's share of the stream, is known by any name.

    `window` bounds the examples that are unanswered, or answered and not yet taken, per worker; there may always be two
    batches. `in_all` bounds them over all workers; None does not.
    """

    def __init__(self, *, window: int, in_all: int | None = None, n_workers: int = 1) -> None:
        self._window = window
        self._in_all = in_all
        self._n_workers = n_workers
        self._waiting: list[Part] = []  # in the order of their places
        self._sent: dict[str, tuple[Part, Hashable]] = {}
        self._n_examples = 0
        self._n_batches = 0
        self._n_undelivered = 0
        self.is_exhausted = False  # whether the caller's batches are at their end

    @property
    def n_unanswered(self) -> int:
        """How many parts wait or fly."""
        return len(self._waiting) + len(self._sent)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to be read, and every answer has been delivered."""
        return self.is_exhausted and not self._n_undelivered

    def add(self, entry: Entry, spans: Sequence[range]) -> None:
        """Take a batch in, to be sent as one part for each span of its examples."""
        entry.n_open = len(spans)
        self._n_examples += len(entry.batch)
        self._n_batches += 1
        self._n_undelivered += 1
        for span in spans:
            self._enqueue(Part(entry, span.start, entry.batch.part(span)))

    def may_read(self, worker: Hashable, now_s: float) -> bool:
        """Say whether a worker may read another batch: there is room, and none could be sent now or has to be alone."""
        if self.is_exhausted or any(part.not_before_s <= now_s for part in self._waiting):
            return False
        held = self._held_by(worker)
        if any(part.is_suspect for part in held):
            return False
        has_turn = len(held) < MIN_BATCHES or sum(len(part.batch) for part in held) < self._window
        return has_turn and self._has_room()

    def send(self, worker: Hashable, now_s: float, *, fits: Callable[[Part], bool] = lambda _: True) -> Part | None:
        """Hand a worker the next part; None where there is none for it now, or it has no place for that one."""
        held = self._held_by(worker)
        if any(part.is_suspect for part in held):
            return None
        for place, part in enumerate(self._waiting):
            if part.not_before_s > now_s or part.id in self._sent:  # a caller's id may equal that of a part
                continue
            if part.is_suspect and held:  # it must be alone: the worker runs empty first
                return None
            if not fits(part):
                return None
            del self._waiting[place]
            self._sent[part.id] = part, worker
            return part
        return None

    def has_id(self, id_: str) -> bool:
        """Say whether an unanswered batch has this id."""
        sent = (part for part, _ in self._sent.values())
        return any(part.entry.id == id_ for part in (*self._waiting, *sent))

    def free_id(self, index: int) -> str:
        """Return an id for the batch at a position that has none, and that no unanswered batch has."""
        id_ = str(index)
        while self.has_id(id_):
            id_ += "'"
        return id_

    def get(self, id_: str) -> Part | None:
        """Return a part that flies."""
        part, _ = self._sent.get(id_, (None, None))
        return part

    def pop(self, id_: str) -> Part | None:
        """Take a part out. None where it was answered before, or given up: an answer comes once."""
        part, _ = self._sent.pop(id_, (None, None))
        return part

    def requeue(self, part: Part, *, not_before_s: float) -> None:
        """Let a part that flies wait, and be sent again."""
        del self._sent[part.id]
        part.not_before_s = not_before_s
        self._enqueue(part)

    def requeue_halves(self, part: Part) -> None:
        """Let a part that flies be sent again as two: it was too large for its server."""
        del self._sent[part.id]
        half = len(part.batch) // 2
        for span in (range(half), range(half, len(part.batch))):
            self._enqueue(Part(part.entry, part.start + span.start, part.batch.part(span), is_suspect=part.is_suspect))
        part.entry.n_open += 1

    def remove_sent(self, worker: Hashable) -> list[Part]:
        """Take out what a worker held when its call ended, to be given up whole."""
        held = self._held_by(worker)
        for part in held:
            del self._sent[part.id]
        return held

    def requeue_after_call_end(self, worker: Hashable, *, died: bool) -> list[Part]:
        """Take back what a worker held when its call ended. Returns the parts that are given up."""
        held = self.remove_sent(worker)
        for part in held:
            if died:
                part.is_suspect = True
                part.n_deaths += len(held) == 1
        given_up = [part for part in held if part.n_deaths >= DEATHS]
        for part in held:
            if part not in given_up:
                self._enqueue(part)
        return given_up

    def pop_overdue(self, now_s: float) -> tuple[list[Part], set[Hashable]]:
        """Take out the parts whose time is over. Returns them, and workers whose servers were silent about theirs."""
        waiting = [part for part in self._waiting if now_s >= part.entry.deadline_s]
        silent = {id_: each for id_, each in self._sent.items() if now_s >= self._expires_s(each[0])}
        self._waiting = [part for part in self._waiting if part not in waiting]
        for id_ in silent:
            del self._sent[id_]
        return waiting + [part for part, _ in silent.values()], {worker for _, worker in silent.values()}

    def next_deadline_s(self) -> float | None:
        """Return when the next part will be overdue; None without any."""
        dues_s = [part.entry.deadline_s for part in self._waiting]
        dues_s += [self._expires_s(part) for part, _ in self._sent.values()]
        return min(dues_s, default=None)

    def next_sending_s(self, now_s: float) -> float | None:
        """Return when the first of the parts may be sent that have to wait for a full server; None without any."""
        return min((part.not_before_s for part in self._waiting if part.not_before_s > now_s), default=None)

    def mark_delivered(self) -> None:
        """Count a batch whose answer waits for the caller, or came before it was sent."""
        self._n_undelivered -= 1

    def release(self, entry: Entry) -> None:
        """Free the room of a batch whose answer the caller has taken."""
        self._n_batches -= 1
        self._n_examples -= len(entry.batch)

    def _enqueue(self, part: Part) -> None:
        bisect.insort(self._waiting, part, key=lambda each: each.position)

    def _held_by(self, worker: Hashable) -> list[Part]:
        return [part for part, sent_to in self._sent.values() if sent_to == worker]

    def _has_room(self) -> bool:
        if self._in_all is not None:
            return self._n_batches < MIN_BATCHES or self._n_examples < self._in_all
        return self._n_batches < MIN_BATCHES * self._n_workers or self._n_examples < self._window * self._n_workers

    @staticmethod
    def _expires_s(part: Part) -> float:
        return part.entry.deadline_s + GRACE_S
