"""Work: a request in progress. Its rows that have not run, and its answer as it fills."""

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .attribution import Array, ExampleFailure, Explanation, Request
from .errors import SidelightError
from .models.model import Model
from .preparation import Prepared

GRADIENT_AT_INPUT: Hashable = None  # the probe of a key: gradients are taken at the model's input


@dataclass(frozen=True, slots=True)
class Row:
    """One example at one point: the unit of work."""

    work: "Work"
    place: int
    example: Array
    target: int | None


class Work:
    """A request's rows and its answer.

    `take` is called by the scheduler and `give` and `fail` by the runner, all on the thread that owns the device;
    `cancel` may come from any thread. `on_done` is called once, on that same thread, when every row has been answered.
    """

    def __init__(
        self, request: Request, model: Model, prepared: Prepared, *, on_done: Callable[[], None] = lambda: None
    ) -> None:
        self.request = request
        self.model = model
        self.prepared = prepared
        self.explanations: list[Explanation | None] = [None] * len(prepared.examples)
        self.failures: list[ExampleFailure] = []
        self.probabilities: NDArray[np.float32] | None = None
        self.started_s = self.ended_s = time.monotonic()
        self._on_done = on_done
        self._cancelled = threading.Event()
        self._places = [place for place, each in enumerate(prepared.examples) if not isinstance(each, SidelightError)]
        self._n_taken = 0
        self._n_unanswered = len(self._places)
        self._maps: NDArray[np.float32] | None = None
        staged: np.dtype[np.generic] = np.dtype(np.uint8)
        for place, each in enumerate(prepared.examples):
            if isinstance(each, SidelightError):
                self._record(place, each)
            else:
                staged = each.dtype
        self._key = (model.name, model.version, GRADIENT_AT_INPUT, prepared.shape, staged)

    @property
    def key(self) -> Hashable:
        """What rows must share to run in one chunk: model version, probe, shape and dtype."""
        return self._key

    @property
    def cancelled(self) -> bool:
        """Whether the rows that have not run are to be dropped."""
        return self._cancelled.is_set()

    @property
    def pending(self) -> int:
        """How many rows have not been taken."""
        return len(self._places) - self._n_taken

    def cancel(self) -> None:
        """Drop the rows that have not run. There will be no answer."""
        self._cancelled.set()

    def take(self) -> Row:
        """Give the next row away."""
        if not self._n_taken:
            self.started_s = time.monotonic()
        place = self._places[self._n_taken]
        self._n_taken += 1
        example = self.prepared.examples[place]
        assert not isinstance(example, SidelightError)  # noqa: S101
        return Row(self, place, example, self.prepared.targets[place])

    def give(self, row: Row, map_: Array, explanation: Explanation, probabilities: NDArray[np.float32] | None) -> None:
        """Answer a row. The arrays are copied."""
        self.maps()[row.place] = map_
        self.explanations[row.place] = explanation
        if probabilities is not None:
            if self.probabilities is None:
                self.probabilities = np.full((len(self.explanations), len(probabilities)), np.nan, np.float32)
            self.probabilities[row.place] = probabilities
        self._answered()

    def fail(self, row: Row, error: SidelightError) -> None:
        """Answer a row with a failure."""
        self._record(row.place, error)
        self._answered()

    def maps(self) -> NDArray[np.float32]:
        """Return the maps, [N, H, W] or [N, C, H, W]; those of failed examples are NaN."""
        if self._maps is None:  # not before the first row ran: a request that waits holds no memory for its answer
            self._maps = np.empty(self.prepared.maps_shape, np.float32)
            self._maps[[failure.example for failure in self.failures]] = np.nan
        return self._maps

    def _record(self, place: int, error: SidelightError) -> None:
        self.failures.append(ExampleFailure(place, error.code, error.message))
        if self._maps is not None:
            self._maps[place] = np.nan

    def _answered(self) -> None:
        self._n_unanswered -= 1
        if not self._n_unanswered:
            self.ended_s = time.monotonic()
            self._on_done()
