"""The result queue: answers that have come and that the caller of a stream has not taken yet."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..results.attribution import Attribution
from .unanswered import Entry

Answered = tuple[Entry, Attribution]


@dataclass(frozen=True, slots=True)
class End:
    """Why nothing more comes: an exception, or None where all is answered."""

    error: BaseException | None


class ResultQueue:
    """Filled by the workers, emptied by the caller. Of each batch it holds the newest answer alone.

    So a caller who is slow is handed fewer of the answers that are not final, and none that is out of date. `on_change`
    is called whenever there may be something to take.
    """

    def __init__(self, *, on_change: Callable[[], None] = lambda: None) -> None:
        self._on_change = on_change
        self._changed = threading.Condition()
        self._answers: dict[int, Answered] = {}  # by the batch's index, in the order in which they first came
        self._end: End | None = None

    def put(self, entry: Entry, answer: Attribution) -> None:
        """Hold an answer, in place of an older one of its batch."""
        with self._changed:
            self._answers[entry.index] = entry, answer
            self._changed.notify_all()
        self._on_change()

    def close(self, end: End) -> None:
        """Say that nothing more comes. The first who says it is believed."""
        with self._changed:
            self._end = self._end or end
            self._changed.notify_all()
        self._on_change()

    def wait(self) -> Answered | End:
        """Wait for an answer, or when all are taken the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._answers or self._end)
        taken = self.take()
        assert taken is not None  # noqa: S101  (one caller takes)
        return taken

    def take(self) -> Answered | End | None:
        """Return an answer, or when all are taken the end; None where there is neither."""
        with self._changed:
            if not self._answers:
                return self._end
            return self._answers.pop(next(iter(self._answers)))
