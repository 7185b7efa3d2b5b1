"""The reorder buffer: yields a stream's answers in the order of their batches."""

from ..results.attribution import Attribution
from .parts import Entry
from .results_queue import Answered


class ReorderBuffer:
    """Holds early answers back if the stream is ordered; passes all on at once if not."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._early: dict[int, Answered] = {}  # bounded by the window: an answer occupies it until it is released
        self._due = 0

    def admit(self, entry: Entry, answer: Attribution) -> list[Answered]:
        """Return the answers to yield now. If ordered, only the batch that is due yields non-final answers."""
        if not self._ordered:
            return [(entry, answer)]
        if not answer.final:
            return [(entry, answer)] if entry.index == self._due else []
        self._early[entry.index] = entry, answer
        ready = []
        while self._due in self._early:
            ready.append(self._early.pop(self._due))
            self._due += 1
        return ready
