"""An active request: examples that have not started, examples on the device, and the answer as it fills."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compute.weights import Identity
from ..domain import Array, ExampleFailure, ExplainedTarget, Explanation, Request
from ..errors import SidelightError
from ..models.model import Model
from ..telemetry.call_record import ChunkTimes
from .example_run import ExampleRun, Result, Row
from .preparation import Prepared

Told = Callable[[], None]


class ActiveRequest:
    """A request's example runs and its answer.

    `take` is called by the scheduler; `store_result` and `fail` by the device worker, all on the thread that owns the
    device; `cancel` and `snapshot` may come from any thread. On that same thread `on_done` is called once, when every
    example has been answered, and `on_improved`, where it is given, whenever a map that is not final has come.
    """

    def __init__(
        self,
        request: Request,
        model: Model,
        prepared: Prepared,
        *,
        on_done: Told = lambda: None,
        on_improved: Told | None = None,
        id_: str = "",
        caller: str = "",
        chunks: list[ChunkTimes] | None = None,
    ) -> None:
        self.request = request
        self.model = model
        self.prepared = prepared
        self.id = id_  # the caller's name for it, for the log
        self.caller = caller
        self.chunks = chunks  # where it is told which chunks its rows were in; None: nobody wants to know
        self.n_taken = 0  # rows that were taken to the device
        self.n_running = 0  # rows that were taken and not given back, under the device worker's lock
        self.cancelled_s: float | None = None  # None also where all was answered before
        self.started_s: float | None = None  # when the first row was taken
        self.ended_s = time.monotonic()
        self._on_done = on_done
        self._on_improved = on_improved
        self._is_cancelled = False
        self._lock = threading.Lock()  # over the answer as it fills
        self._explanations: list[Explanation | None] = [None] * len(prepared.examples)
        self._failures: list[ExampleFailure] = []
        self._maps: NDArray[np.float32 | np.float64] | None = None
        self._dtype = model.staged_dtype if request.exact else np.dtype(np.float32)
        self._probabilities: NDArray[np.float32] | None = None
        self._open: list[ExampleRun] = []  # those whose method has begun and not ended
        self._to_come: deque[int] = deque()
        for place, each in enumerate(prepared.examples):
            if isinstance(each, SidelightError):
                self._failures.append(ExampleFailure(place, each.code, each.message))
            else:
                self._to_come.append(place)
        self._n_unanswered = len(self._to_come)
        self._identity: Identity | None = None

    @property
    def key(self) -> Hashable:
        """What rows must share to run in one chunk: model version, shape, head, whether a gradient is wanted, where.

        The type is the model's own: pixels and floats are the same once they are staged.
        """
        gradient = self._next().wants_gradient
        probe = self.request.method.probe if gradient else None
        request = self.request
        return self.model.name, self.model.version, self.prepared.shape, request.plain_head, gradient, probe

    @property
    def cancelled(self) -> bool:
        """Whether the rows that have not run are to be dropped."""
        return self._is_cancelled

    @property
    def pending(self) -> int:
        """How many rows can be taken now."""
        return len(self._to_come) + sum(example_run.pending for example_run in self._open)

    @property
    def most_at_once(self) -> int:
        """How many rows a chunk that begins with the next one takes."""
        return self.model.rows_at_once(self.prepared.shape)

    @property
    def most_rows(self) -> int:
        """How many rows the request takes at most."""
        rows, top_k = self.request.method.rows(self.prepared.shape), self.prepared.top_k
        # Which classes are explained is found by one look more.
        return len(self.prepared.examples) * (1 + top_k * rows if top_k else rows)

    @property
    def is_done(self) -> bool:
        """Whether every example has been answered."""
        return not self._n_unanswered

    def cancel(self) -> None:
        """Drop the rows that have not run. There will be no answer, unless there is one already."""
        if not self.is_done and self.cancelled_s is None:
            self.cancelled_s = time.monotonic()
        self._is_cancelled = True

    def take(self) -> "tuple[ActiveRequest, Row]":
        """Give the next row away: of the first example that has one, so that few are open at a time."""
        if self.started_s is None:
            self.started_s = time.monotonic()
        self.n_running += 1
        self.n_taken += 1
        return self, self._next().take()

    @property
    def identity(self) -> Identity:
        """What has computed the answer so far: empty where the weights were written to between its rows."""
        return self._identity or Identity(self.model.digest, self.model.canary)

    def is_computed_by(self, identity: Identity) -> None:
        """Take note of what has computed some rows."""
        self._identity = identity if self._identity in (None, identity) else Identity()

    def store_result(self, example_run: ExampleRun, maps: Array, result: Result, probabilities: Array | None) -> None:
        """Take an example run's newest result in: maps, [k, …], and probabilities, [K], on the host."""
        explanation = Explanation(
            result.predicted,
            result.probability,
            tuple(map(_judged, result.targets, result.is_negligible, maps)),
            self.prepared.geometries[example_run.place],
            result.convergence,
        )
        with self._lock:
            taken = maps if self.prepared.top_k else maps[0]
            if len(self._explanations) == 1 and result.is_final:  # all of the answer, and nobody writes to it again
                self._maps = taken[None].astype(self._dtype, copy=False)
            else:
                self._reserve()[example_run.place] = taken
            self._explanations[example_run.place] = explanation
            if probabilities is not None:
                if self._probabilities is None:
                    shape = (len(self._explanations), len(probabilities))
                    self._probabilities = np.full(shape, np.nan, np.float32)
                self._probabilities[example_run.place] = probabilities
        if result.is_final:
            self._end(example_run)
        elif self._on_improved:
            self._on_improved()

    def fail(self, example_run: ExampleRun, error: SidelightError) -> None:
        """Answer an example with a failure. One that has been answered is passed over."""
        if example_run not in self._open:
            return
        with self._lock:
            self._failures.append(ExampleFailure(example_run.place, error.code, error.message))
            self._explanations[example_run.place] = None
            if self._maps is not None:  # memory may be what lacks, so this takes none
                self._maps[example_run.place] = np.nan
        self._end(example_run)

    def snapshot(self) -> dict[str, Any]:
        """Return the answer so far: maps, explanations, failures and probabilities, as `Answer` names them."""
        with self._lock:
            maps = self._reserve()
            if not self.is_done:
                maps = maps.copy()
                maps[[explanation is None for explanation in self._explanations]] = np.nan
            return {
                "maps": maps,
                "explanations": tuple(self._explanations),
                "failures": tuple(sorted(self._failures, key=lambda failure: failure.example)),
                "probabilities": self._known_probabilities(),
            }

    def release(self) -> None:
        """Let go of what the device holds for this. Called once none of its rows runs."""
        self._to_come.clear()
        for example_run in self._open:
            example_run.close()
        self._open.clear()

    def _next(self) -> ExampleRun:
        """Return the example run that has the next row."""
        for example_run in self._open:
            if example_run.pending:
                return example_run
        place = self._to_come.popleft()
        example_run = ExampleRun(
            self.request, self.model, self.prepared, place, is_watched=self._on_improved is not None
        )
        self._open.append(example_run)
        return example_run

    def _reserve(self) -> NDArray[np.float32 | np.float64]:
        """Return the maps. Those of examples that have failed are NaN; what is still to come is anything."""
        if self._maps is None:  # not before the first came: a request that waits holds no memory for its answer
            self._maps = np.empty(self.prepared.maps_shape, self._dtype)
            self._maps[[failure.example for failure in self._failures]] = np.nan
        return self._maps

    def _known_probabilities(self) -> NDArray[np.float32] | None:
        if not self.request.probabilities:
            return None
        if self._probabilities is None:
            return np.full((len(self._explanations), self.model.class_count), np.nan, np.float32)
        return self._probabilities if self.is_done else self._probabilities.copy()

    def _end(self, example_run: ExampleRun) -> None:
        self._open.remove(example_run)
        example_run.close()
        self._n_unanswered -= 1
        if self.is_done:
            self.ended_s = time.monotonic()
            self._on_done()


def _judged(target: ExplainedTarget, is_negligible: bool | None, map_: Array) -> ExplainedTarget:
    """Return what is explained with its map judged: one below what its type holds with all digits is nothing."""
    if is_negligible is None:
        least = np.finfo(np.float64 if map_.dtype == np.float64 else np.float32).tiny
        is_negligible = bool(max(map_.max(initial=0), -map_.min(initial=0)) < least)
    return replace(target, negligible=True) if is_negligible else target
