"""The dispatcher: chooses the worker that sends the next part, and the worker that reads the caller's next batch."""

import itertools
from collections.abc import Callable, Hashable

from ..._transport.balancing import least_loaded
from .parts import Part
from .resend_queue import ResendQueue

CANDIDATES = 32  # idle workers that are compared at a time


class Dispatcher:
    """Gives work to the idle worker whose server is expected to finish it first.

    A worker is idle from `add_idle` until it gets work or leaves. Only idle workers are considered: the connection of
    another may be stalled. A choice holds until the chosen worker has acted: otherwise two workers could each wait for
    the other one. `on_choice` is called to wake it.
    """

    def __init__(self, queue: ResendQueue, *, on_choice: Callable[[], None] = lambda: None) -> None:
        self._queue = queue
        self._on_choice = on_choice
        self._sender: Hashable | None = None
        self._reader: Hashable | None = None
        self._idle: dict[Hashable, None] = {}  # in the order in which they became idle
        self._blocked: set[Hashable] = set()  # those without shared memory for their next part

    @property
    def has_idle(self) -> bool:
        return bool(self._idle)

    def add_idle(self, worker: Hashable) -> None:
        """Record that a worker is idle, until it gets work or leaves."""
        self._idle.setdefault(worker)

    def leave(self, worker: Hashable) -> None:
        """Record that a worker wants no more work."""
        self._idle.pop(worker, None)
        self._sender = None if self._sender == worker else self._sender
        self._reader = None if self._reader == worker else self._reader

    def unblock(self, worker: Hashable) -> None:
        """Record that a worker has shared memory again."""
        self._blocked.discard(worker)

    def take(self, worker: Hashable, now_s: float, *, fits: Callable[[Part], bool] = lambda _: True) -> Part | None:
        """Return a worker's next part and mark it sent; None if there is none, or another worker should send it."""
        part = self._queue.next_part(worker, now_s)
        if part is None or worker != self.next_to_send(now_s, len(part.batch)):
            return None
        if (part := self._queue.send(worker, now_s, fits=fits)) is None:
            self._blocked.add(worker)
        else:
            self.leave(worker)
        return part

    def next_to_send(self, now_s: float, n_examples: int = 1) -> Hashable | None:
        """Return the idle worker that should send a part of `n_examples` now; None if there is no part for any."""
        if self._sender is None or not self._can_send(self._sender, now_s):
            self._sender = self._least_loaded(now_s, n_examples)
            if self._sender is not None:
                self._on_choice()
        return self._sender

    def next_to_read(self, now_s: float) -> Hashable | None:
        """Return the idle worker that should read the next batch; None if the window has no room."""
        if not self._queue.has_room(now_s):
            return None
        if self._reader is None or not self._queue.may_read(self._reader, now_s):
            self._reader = next((each for each in self._idle if self._queue.may_read(each, now_s)), None)
            if self._reader is not None:
                self._on_choice()
        return self._reader

    def _can_send(self, worker: Hashable, now_s: float) -> bool:
        return worker not in self._blocked and self._queue.next_part(worker, now_s) is not None

    def _least_loaded(self, now_s: float, n_examples: int) -> Hashable | None:
        if not self._queue.has_parts:
            return None
        idle = (each for each in self._idle if self._can_send(each, now_s))
        compared = [(each, self._queue.load(each)) for each in itertools.islice(idle, CANDIDATES)]
        if len(self._idle) > CANDIDATES:  # the others are compared next time
            for each, _ in compared:
                del self._idle[each]
                self._idle[each] = None
        return least_loaded(compared, n_examples, now_s)
