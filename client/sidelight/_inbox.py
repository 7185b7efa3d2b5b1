"""The inbox: answers that have come and that the caller of a stream has not taken yet."""

import threading
from dataclasses import dataclass

from ._attribution import Attribution
from ._window import Sent

Answered = tuple[Sent, Attribution]


@dataclass(frozen=True, slots=True)
class End:
    """Why nothing more comes: an exception, or None where all is answered."""

    error: BaseException | None


class Inbox:
    """Filled by the receiver, emptied by the caller. Of each batch it holds the newest answer alone.

    So a caller who is slow is handed fewer of the answers that are not final, and none that is out of date.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answers: dict[int, Answered] = {}  # by the batch's index, in the order in which they first came
        self._end: End | None = None

    def put(self, sent: Sent, answer: Attribution) -> None:
        """Hold an answer, in place of an older one of its batch."""
        with self._changed:
            self._answers[sent.index] = sent, answer
            self._changed.notify_all()

    def close(self, end: End) -> None:
        """Say that nothing more comes. The first who says it is believed."""
        with self._changed:
            self._end = self._end or end
            self._changed.notify_all()

    def take(self, timeout_s: float) -> Answered | End | None:
        """Wait for an answer, or when all are taken the end. None when neither has come in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._answers or self._end, timeout_s)
            if not self._answers:
                return self._end
            return self._answers.pop(next(iter(self._answers)))
