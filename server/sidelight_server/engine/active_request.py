"""An active request: its examples that have not started, its example runs, and the partial answer."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compute.weights import Identity
from ..domain import ExampleFailure, ExplainedTarget, Explanation, Request
from ..errors import SidelightError
from ..methods.method import HostMaps
from ..models.model import Model
from ..telemetry.call_record import ChunkTimes
from .example_run import ExampleRun, Result, Row
from .preparation.examples import Prepared

Callback = Callable[[], None]


class ActiveRequest:
    """A request's example runs and its answer.

    The scheduler calls `take`, the device worker `store_results` and `fail`, all on the thread that owns the device;
    `cancel` and `snapshot` may be called from any thread. The device's thread calls `on_done` once, when every example
    has a result or a failure, and `on_improved`, if given, after each partial result.
    """

    def __init__(
        self,
        request: Request,
        model: Model,
        prepared: Prepared,
        *,
        on_done: Callback = lambda: None,
        on_improved: Callback | None = None,
        id_: str = "",
        caller: str = "",
        chunks: list[ChunkTimes] | None = None,
    ) -> None:
        self.request = request
        self.model = model
        self.kernel = model.kernels.of(request.method.name)
        self.prepared = prepared
        self.id = id_  # the client's request id, for the log
        self.caller = caller
        self.chunks = chunks  # the chunks that its rows ran in are appended here; None: not recorded
        self.max_rows = _max_rows(request, prepared)
        self.n_taken = 0  # rows that were sent to the device
        self.n_running = 0  # rows in flight; guarded by the device worker's lock
        self.cancelled = False  # whether the rows that have not run will be dropped
        self.cancelled_s: float | None = None  # None also if it was cancelled after its last example
        self.started_s: float | None = None  # when the first row was taken
        self.ended_s = time.monotonic()
        self._on_done = on_done
        self._on_improved = on_improved
        self._lock = threading.Lock()  # guards the fields of the answer, below
        self._explanations: list[Explanation | None] = [None] * len(prepared.examples)
        self._failures: list[ExampleFailure] = []
        self._maps: NDArray[np.float32 | np.float64] | None = None
        self._dtype = model.staged_dtype if request.exact else np.dtype(np.float32)
        self._probabilities: NDArray[np.float32] | None = None
        self._open: list[ExampleRun] = []  # started and not ended
        self._not_started: deque[int] = deque()  # indices of examples
        for index, each in enumerate(prepared.examples):
            if isinstance(each, SidelightError):
                self._failures.append(ExampleFailure(index, each.code, each.message))
            else:
                self._not_started.append(index)
        self._n_unanswered = len(self._not_started)
        self._identity: Identity | None = None

    @property
    def key(self) -> Hashable:
        """What rows must share to run in one chunk: kernel, shape, head, and the probe if a gradient is taken.

        The input type is not part of it: staging converts pixels and floats to the model's own type.
        """
        gradient = self._next().wants_gradient
        probe = self.request.method.probe if gradient else None
        request = self.request
        return self.kernel, self.prepared.shape, request.plain_head, gradient, probe

    @property
    def pending(self) -> int:
        """Number of rows that can be taken now."""
        return len(self._not_started) + sum(example_run.pending for example_run in self._open)

    @property
    def max_chunk_rows(self) -> int:
        """The largest number of rows of a chunk that begins with this request's next row."""
        return self.model.rows_at_once(self.prepared.shape)

    @property
    def is_done(self) -> bool:
        """Whether every example has a result or a failure."""
        return not self._n_unanswered

    def cancel(self) -> None:
        """Drop the rows that have not run. `on_done` is not called unless the request is already done."""
        if not self.is_done and self.cancelled_s is None:
            self.cancelled_s = time.monotonic()
        self.cancelled = True

    def take(self) -> "tuple[ActiveRequest, Row]":
        """Return the next row, from the first example run that has one, so that few examples are open at a time."""
        if self.started_s is None:
            self.started_s = time.monotonic()
        self.n_running += 1
        self.n_taken += 1
        return self, self._next().take()

    @property
    def identity(self) -> Identity:
        """Identity of the model that computed the answer so far; empty if its weights changed between two chunks."""
        return self._identity or Identity(self.model.digest, self.model.identity.canary)

    def add_identity(self, identity: Identity) -> None:
        """Record the identity of the model that computed some of its rows."""
        self._identity = identity if self._identity in (None, identity) else Identity()

    def store_results(self, results: Sequence[tuple[ExampleRun, Result, HostMaps]]) -> None:
        if self._is_whole_answer(results):
            first, last = results[0][2], results[-1][2]
            maps = first.together[first.start : last.end].reshape(self.prepared.maps_shape)
            with self._lock:
                self._maps = maps.astype(self._dtype, copy=False)
        else:
            for example_run, _, own in results:
                with self._lock:
                    self._reserve()[example_run.index] = own.elements if self.prepared.top_k else own.elements[0]
        for example_run, result, own in results:
            self._store(example_run, result, own.largest)

    def _is_whole_answer(self, results: Sequence[tuple[ExampleRun, Result, HostMaps]]) -> bool:
        """Whether these are the final maps of all examples, in order and without a gap: then none is copied."""
        if len(results) != len(self._explanations):
            return False
        maps = [own for _, _, own in results]
        return (
            all(result.is_final for _, result, _ in results)
            and all(example_run.index == index for index, (example_run, _, _) in enumerate(results))
            and all(map(HostMaps.precedes, maps, maps[1:]))
        )

    def _store(self, example_run: ExampleRun, result: Result, magnitudes: NDArray[np.floating]) -> None:
        explanation = Explanation(
            result.predicted,
            result.probability,
            tuple(map(_with_negligible, result.targets, result.is_negligible, magnitudes)),
            self.prepared.geometries[example_run.index],
            result.convergence,
        )
        probabilities = result.probabilities.float().cpu().numpy() if self.request.probabilities else None  # [K]
        with self._lock:
            self._explanations[example_run.index] = explanation
            if probabilities is not None:
                if self._probabilities is None:
                    shape = (len(self._explanations), len(probabilities))
                    self._probabilities = np.full(shape, np.nan, np.float32)
                self._probabilities[example_run.index] = probabilities
        if result.is_final:
            self._end(example_run)
        elif self._on_improved:
            self._on_improved()

    def fail(self, example_run: ExampleRun, error: SidelightError) -> None:
        """Record the failure of an example. Does nothing if the example already has a result or a failure."""
        if example_run not in self._open:
            return
        with self._lock:
            self._failures.append(ExampleFailure(example_run.index, error.code, error.message))
            self._explanations[example_run.index] = None
            if self._maps is not None:  # allocates nothing: the failure may be a lack of memory
                self._maps[example_run.index] = np.nan
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

    def free_memory(self) -> None:
        """Free the request's memory on the device. Call it only while none of its rows is in flight."""
        self._not_started.clear()
        for example_run in self._open:
            example_run.close()
        self._open.clear()

    def _next(self) -> ExampleRun:
        """Return the example run that has the next row, starting one if none has."""
        for example_run in self._open:
            if example_run.pending:
                return example_run
        index = self._not_started.popleft()
        example_run = ExampleRun(
            self.request, self.model, self.prepared, index, is_watched=self._on_improved is not None
        )
        self._open.append(example_run)
        return example_run

    def _reserve(self) -> NDArray[np.float32 | np.float64]:
        """Return the array of the maps: NaN for failed examples, uninitialized for those without a result."""
        if self._maps is None:  # allocated with the first result: a waiting request holds no memory for its answer
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


def _max_rows(request: Request, prepared: Prepared) -> int:
    """Return an upper bound of the rows that the request takes."""
    rows, top_k = request.method.rows(prepared.shape), prepared.top_k
    # One more row per example finds the classes to explain.
    return len(prepared.examples) * (1 + top_k * rows if top_k else rows)


def _with_negligible(target: ExplainedTarget, is_negligible: bool | None, magnitude: np.floating) -> ExplainedTarget:
    """Return a target with `negligible` set if the map is below the smallest normal number of its type."""
    if is_negligible is None:
        is_negligible = bool(magnitude < np.finfo(magnitude.dtype).tiny)
    return replace(target, negligible=True) if is_negligible else target
