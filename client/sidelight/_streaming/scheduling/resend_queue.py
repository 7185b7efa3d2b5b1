"""The resend queue of a stream: keeps each part until it is answered, and decides which parts are sent again.

A batch is sent as one part, or as several parts if it exceeds a limit. If a server's call ends before it has answered a
part, the part is sent again: it is executed at least once and answered once. The parts that a server held when it died
are suspects, because one of them may have killed it. Each suspect is sent alone. If two servers died with a suspect as
their only part, the suspect is given up, so that it cannot kill every replica.

With hedging, a part that has not been answered for a while is sent to a second server. The first answer is used; the
other server gets a cancel message, and its answer is ignored.
"""

import bisect
from collections.abc import Callable, Hashable, Iterable, Sequence

from ..._transport.balancing import Load
from .parts import Entry, Part

MIN_BATCHES = 2  # one is computed while the next is transferred
DEATHS = 2  # number of servers that a part may kill before it is given up: one death may be a coincidence
# The server fails a batch at its timeout. The client waits this much longer for that answer, then fails it itself.
GRACE_S = 5.0


class ResendQueue:
    """The unanswered parts of a stream: those that wait to be sent, and those that are sent to a worker.

    A worker stands for one server and may be any hashable value. `window` limits the examples of each worker that are
    unanswered, or answered and not yet released; two batches are always allowed. `total_window` limits those of all
    workers together (None: no limit). Each worker gets an equal share of it, so that a stalled server cannot occupy it
    all. `hedge_after_s` is the age at which a sent part is sent to a second worker (None: never).
    """

    def __init__(self, *, window: int, total_window: int | None = None, hedge_after_s: float | None = None) -> None:
        self._window = window
        self._total_window = total_window
        self._hedge_after_s = hedge_after_s
        self._waiting: list[Part] = []  # sorted by position
        self._sent: dict[str, Part] = {}
        self._held: dict[Hashable, dict[str, Part]] = {}  # the sent parts of each worker
        self._loads: dict[Hashable, Load] = {}
        self._abandoned: dict[Hashable, dict[str, bool]] = {}  # answered elsewhere; True once the cancel is sent
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
    def has_parts(self) -> bool:
        """Whether there are parts that may be sent, now or later."""
        return bool(self._waiting) or (self._hedge_after_s is not None and bool(self._sent))

    @property
    def is_done(self) -> bool:
        """Whether all batches have been read and all answers delivered."""
        return self.is_exhausted and not self._n_undelivered

    def add_worker(self, worker: Hashable, load: Load | None = None) -> None:
        """Add a worker, whose window is added to that of the others."""
        self._held[worker], self._abandoned[worker] = {}, {}
        self._loads[worker] = load or Load()

    def remove_worker(self, worker: Hashable) -> None:
        """Remove a worker that holds no part."""
        del self._held[worker], self._abandoned[worker], self._loads[worker]

    def load(self, worker: Hashable) -> Load:
        return self._loads[worker]

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

        It may if the window has room, no waiting part could be sent now, the worker's sent parts leave room in its own
        share, and none of them is a suspect.
        """
        if not self.has_room(now_s) or self._holds_suspect(worker):
            return False
        held = self._held[worker].values()
        return len(held) < MIN_BATCHES or sum(len(part.batch) for part in held) < self._share

    def has_room(self, now_s: float) -> bool:
        """Return whether the windows of all workers together have room, and no waiting part could be sent now."""
        if self.is_exhausted or any(part.not_before_s <= now_s for part in self._waiting):
            return False
        n_workers = len(self._held)
        n_batches = MIN_BATCHES if self._total_window is not None else MIN_BATCHES * n_workers
        n_examples = self._window * n_workers if self._total_window is None else self._total_window
        return self._n_batches < n_batches or self._n_examples < n_examples

    def send(self, worker: Hashable, now_s: float, *, fits: Callable[[Part], bool] = lambda _: True) -> Part | None:
        """Return the next part for a worker and mark it sent; None if there is none for it now, or it does not fit."""
        part = self.next_part(worker, now_s)
        if part is None or not fits(part):
            return None
        if not part.holders:
            self._waiting.remove(part)
            self._sent[part.id] = part
        part.sent_s = now_s
        part.holders.append(worker)
        self._held[worker][part.id] = part
        self._loads[worker].sent(len(part.batch))
        return part

    def next_part(self, worker: Hashable, now_s: float) -> Part | None:
        """Return the part that `send` would return; None if there is none for the worker."""
        if not self.has_parts or self._holds_suspect(worker):
            return None
        held = self._held[worker]
        for part in self._waiting:
            if part.not_before_s > now_s or part.id in self._sent or part.id in self._abandoned[worker]:
                continue  # a caller's batch id may equal a part's id, or that of an earlier batch
            if part.is_suspect and held:  # sent alone: the worker's other parts are answered first
                return None
            return part
        return self._late_part(worker, now_s) if self._hedge_after_s is not None and len(held) < MIN_BATCHES else None

    def has_id(self, id_: str) -> bool:
        """Return whether an unanswered batch has this id."""
        return any(part.entry.id == id_ for part in (*self._waiting, *self._sent.values()))

    def unused_id(self, index: int) -> str:
        """Return an id that no unanswered batch has, for a batch without one."""
        id_ = str(index)
        while self.has_id(id_):
            id_ += "'"
        return id_

    def get(self, id_: str, worker: Hashable | None = None) -> Part | None:
        """Return a sent part; None if none has this id, or a worker is given and does not hold it."""
        part = self._sent.get(id_)
        return part if part and (worker is None or worker in part.holders) else None

    def pop(self, id_: str, worker: Hashable | None = None) -> Part | None:
        """Remove a sent part that a worker has answered.

        None if it has been answered or given up already, so that no part is answered twice. `next_cancel` returns it
        for the other workers that hold it.
        """
        part = self.get(id_, worker)
        if part is None:
            return None
        for each in self._unsend(part):
            if worker is not None and each != worker:
                self._abandoned[each][id_] = False
        return part

    def next_cancel(self, worker: Hashable) -> str | None:
        """Return the id of a part that a worker's server should cancel, once; None if there is none."""
        abandoned = self._abandoned[worker]
        id_ = next((id_ for id_, is_sent in abandoned.items() if not is_sent), None)
        if id_ is not None:
            abandoned[id_] = True
        return id_

    def forget(self, id_: str, worker: Hashable) -> bool:
        """Return whether a response, the last one with this id, belongs to a part that was answered elsewhere."""
        return self._abandoned[worker].pop(id_, None) is not None

    def requeue(self, part: Part, worker: Hashable, *, not_before_s: float) -> None:
        """Enqueue a part again that a worker's server did not accept, to be sent not before a time."""
        self.n_retries += 1
        if self._withdraw(part, worker):
            part.not_before_s = not_before_s
            self._enqueue(part)

    def requeue_halves(self, part: Part, worker: Hashable) -> None:
        """Enqueue a sent part again as two halves: it was too large for its server."""
        if not self._withdraw(part, worker):
            return
        half = len(part.batch) // 2
        for span in (range(half), range(half, len(part.batch))):
            self._enqueue(Part(part.entry, part.start + span.start, part.batch.part(span), is_suspect=part.is_suspect))
        part.entry.n_open += 1

    def remove_sent(self, worker: Hashable) -> list[Part]:
        """Remove and return the parts that only this worker holds."""
        self._abandoned[worker].clear()
        return [part for part in list(self._held[worker].values()) if self._withdraw(part, worker)]

    def requeue_after_call_end(self, worker: Hashable, *, died: bool) -> list[Part]:
        """Enqueue again the parts of a worker whose call has ended. Returns those that are given up."""
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

    def holds(self, worker: Hashable) -> bool:
        """Return whether a worker's server has parts to answer."""
        return bool(self._held[worker])

    def pop_overdue(self, now_s: float) -> tuple[list[Part], set[Hashable]]:
        """Remove the parts whose deadline has passed. Returns them, and the workers that had been sent one of them."""
        waiting = [part for part in self._waiting if now_s >= part.entry.deadline_s]
        self._waiting = [part for part in self._waiting if part not in waiting]
        silent = [part for part in self._sent.values() if now_s >= self._expires_s(part)]
        return waiting + silent, {worker for part in silent for worker in self._unsend(part)}

    def next_deadline_s(self) -> float | None:
        """Return when the next part will be overdue; None if there are no parts."""
        dues_s = [part.entry.deadline_s for part in self._waiting]
        dues_s += [self._expires_s(part) for part in self._sent.values()]
        return min(dues_s, default=None)

    def next_retry_s(self, now_s: float) -> float | None:
        """Return when the first retry delay ends, or the first part can be sent to a second worker; None if none."""
        dues_s = [part.not_before_s for part in self._waiting]
        if self._hedge_after_s is not None and len(self._held) > 1:
            dues_s += [part.sent_s + self._hedge_after_s for part in self._sent.values() if len(part.holders) == 1]
        return min((due_s for due_s in dues_s if due_s > now_s), default=None)

    def mark_delivered(self) -> None:
        """Record that a batch's answer is in the result queue."""
        self._n_undelivered -= 1

    def release(self, entry: Entry) -> None:
        """Free the window that a batch occupies, once the caller has taken its answer."""
        self._n_batches -= 1
        self._n_examples -= len(entry.batch)

    def _holds_suspect(self, worker: Hashable) -> bool:
        held = self._held[worker]  # a suspect is sent alone
        return len(held) == 1 and next(iter(held.values())).is_suspect

    def _enqueue(self, part: Part) -> None:
        bisect.insort(self._waiting, part, key=lambda each: each.position)

    def _late_part(self, worker: Hashable, now_s: float) -> Part | None:
        """Return the oldest part that another worker has held for too long, alone."""
        assert self._hedge_after_s is not None  # noqa: S101
        late = (
            part
            for part in self._sent.values()
            if len(part.holders) == 1 and worker not in part.holders and not part.is_suspect
            and part.sent_s + self._hedge_after_s <= now_s and part.id not in self._abandoned[worker]
        )  # fmt: skip
        return next(late, None)

    def _unsend(self, part: Part) -> Iterable[Hashable]:
        """Take a part from all its holders, and return them."""
        del self._sent[part.id]
        holders, part.holders = part.holders, []
        for worker in holders:
            self._drop(part, worker)
        return holders

    def _withdraw(self, part: Part, worker: Hashable) -> bool:
        """Take a part from one worker. Returns whether no other worker holds it: the part then counts as not sent."""
        self._drop(part, worker)
        part.holders.remove(worker)
        if not part.holders:
            del self._sent[part.id]
        return not part.holders

    def _drop(self, part: Part, worker: Hashable) -> None:
        del self._held[worker][part.id]
        self._loads[worker].ended(len(part.batch))

    @property
    def _share(self) -> int:
        return self._window if self._total_window is None else max(1, self._total_window // max(1, len(self._held)))

    @staticmethod
    def _expires_s(part: Part) -> float:
        return part.entry.deadline_s + GRACE_S
