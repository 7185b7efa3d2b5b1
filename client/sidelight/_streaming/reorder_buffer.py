"""The reorder buffer: hands on a stream's answers in the order of their batches."""

from ..results.attribution import Attribution
from .results_queue import Answered
from .unanswered import Entry


class ReorderBuffer:
    """As answers come, or as their batches came."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._early: dict[int, Answered] = {}  # bounded: an answer holds its room in the window until it is taken
        self._due = 0

    def admit(self, entry: Entry, answer: Attribution) -> list[Answered]:
        """Return what is to be handed on now. In order, only the batch that is due has answers that are not final."""
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
