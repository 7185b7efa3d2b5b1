"""The virtual clock: actions at times, in order."""

import heapq
import itertools
from collections.abc import Callable


class Events:
    """Runs actions at their times. Actions at the same time run in the order in which they were added."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._n_added = itertools.count()
        self._due: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run an action after a delay."""
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._n_added), action))

    def run(self, *, while_: Callable[[], bool]) -> None:
        """Run actions until a condition is no longer met."""
        while while_():
            self.now_s, _, action = heapq.heappop(self._due)
            action()
