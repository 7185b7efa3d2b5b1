"""The result queue: answers that have arrived and wait for the caller."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..results.attribution import Attribution
from .scheduling.parts import Entry

Answered = tuple[Entry, Attribution]


@dataclass(frozen=True, slots=True)
class End:
    """The end of a stream: its error, or None if every batch is answered."""

    error: BaseException | None


class ResultQueue:
    """Filled by the workers, emptied by the caller. It holds only the newest answer of each batch.

    A slow caller therefore gets fewer non-final answers, and never an outdated one. `on_change` is called after each
    change.
    """

    def __init__(self, *, on_change: Callable[[], None] = lambda: None) -> None:
        self._on_change = on_change
        self._changed = threading.Condition()
        self._answers: dict[int, Answered] = {}  # by batch index, ordered by first arrival
        self._end: End | None = None

    def put(self, entry: Entry, answer: Attribution) -> None:
        """Store an answer, and replace an older one of the same batch."""
        with self._changed:
            self._answers[entry.index] = entry, answer
            self._changed.notify_all()
        self._on_change()

    def close(self, end: End) -> None:
        """End the queue. Only the first call has an effect."""
        with self._changed:
            self._end = self._end or end
            self._changed.notify_all()
        self._on_change()

    def wait(self) -> Answered | End:
        """Wait for an answer; return the end once all answers are taken."""
        with self._changed:
            while (taken := self._take()) is None:
                self._changed.wait()
            return taken

    def take(self) -> Answered | End | None:
        """Return an answer, or the end once all answers are taken; None if there is neither yet."""
        with self._changed:
            return self._take()

    def _take(self) -> Answered | End | None:
        if not self._answers:
            return self._end
        return self._answers.pop(next(iter(self._answers)))
