"""The runner: the one thread that owns a device. It takes a chunk at the last moment, runs it, gives the rows back."""

import logging
import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from . import scores
from .attribution import Array, Explanation, Score
from .errors import Internal, InvalidArgument, ResourceExhausted, SidelightError, Unavailable
from .kernel import Gradients
from .methods import gradient
from .models.model import Model
from .scheduler import Ring
from .staging import Staging, is_finite
from .work import Row, Work

log = logging.getLogger("sidelight")


class Runner:
    """The owner of a device, of its ring and of its staging.

    A failing chunk is split until the bad example is alone, and only that one fails. A chunk that does not fit into the
    device's memory is halved, and no larger one is tried again.
    """

    def __init__(self, device: torch.device, *, chunk_rows: int, threads: int) -> None:
        self._device = device
        self._chunk_rows = chunk_rows
        self._threads = threads
        self._staging = Staging(device)
        self._ring: Ring[Row] = Ring()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"sidelight-{device}", daemon=True)

    @property
    def chunk_rows(self) -> int:
        """How many rows the device runs at once, at most."""
        return self._chunk_rows

    def start(self) -> None:
        """Begin to run chunks."""
        self._thread.start()

    def submit(self, work: Work) -> None:
        """Let a request join the ring. `Unavailable` once the runner is closed."""
        with self._changed:
            if self._closed:
                raise Unavailable("the server is shutting down")
            self._ring.add(work)
            self._changed.notify()

    def close(self) -> None:
        """End after the running chunk. Rows that have not run are never answered."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        # OpenMP keeps this number for each thread, so what the process does elsewhere is left alone.
        torch.set_num_threads(self._threads)
        while (rows := self._take_chunk()) is not None:
            if rows:
                self._answer(rows)

    def _take_chunk(self) -> list[Row] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._ring))
            return None if self._closed else self._ring.take_chunk(self._chunk_rows)

    def _answer(self, rows: Sequence[Row]) -> None:
        try:
            maps, answer = self._explain(rows)
        except Exception as error:
            failed = error
        else:
            self._give(rows, maps, answer)
            return
        # Past the except clause, so that what fails next is not logged as its consequence.
        self._answer_failed(rows, failed)

    def _explain(self, rows: Sequence[Row]) -> tuple[list[Array], Gradients]:
        model = rows[0].work.model
        pixels = rows[0].example.dtype == np.uint8
        dtype = np.dtype(np.uint8) if pixels else model.staged_dtype
        inputs = model.inputs(self._staging.to_device([row.example for row in rows], dtype=dtype))
        answer = model.kernel.run(inputs, [row.target for row in rows], [row.work.request.score for row in rows])
        model.class_count = answer.probabilities.shape[1]
        return self._maps(rows, inputs, answer), answer

    def _maps(self, rows: Sequence[Row], inputs: torch.Tensor, answer: Gradients) -> list[Array]:
        """Return each row's map. Rows that are finished alike are finished, and cross the bus, together."""
        alike: dict[object, list[int]] = {}
        for place, row in enumerate(rows):
            alike.setdefault((row.work.request.method, row.work.request.channels), []).append(place)
        maps: list[Array] = [np.empty(0)] * len(rows)
        for places in alike.values():
            request = rows[places[0]].work.request
            whole = len(places) == len(rows)
            finished = gradient.finish(
                answer.gradients if whole else answer.gradients[places],
                inputs if whole else inputs[places],
                method=request.method,
                channels=request.channels,
            )
            host = self._staging.to_host(finished.float())
            for place, map_ in zip(places, host if whole else host.copy(), strict=True):
                maps[place] = map_
        return maps

    def _give(self, rows: Sequence[Row], maps: Sequence[Array], answer: Gradients) -> None:
        explained, selected, predicted = (each.tolist() for each in (answer.explained, answer.scores, answer.predicted))
        probabilities: NDArray[np.float32] = answer.probabilities.float().cpu().numpy()  # [n, K]
        for place, row in enumerate(rows):
            request, model, geometry = row.work.request, row.work.model, row.work.prepared.geometries[row.place]
            explanation = Explanation(
                predicted=predicted[place],
                probability=float(probabilities[place, predicted[place]]),
                explained=explained[place],
                score=selected[place],
                saturated=request.score is Score.PROBABILITY and _is_saturated(selected[place]),
                geometry=geometry,
            )
            error = _fault(row, model, maps[place], explanation)
            if error is not None:
                row.work.fail(row, error)
            else:
                row.work.give(row, maps[place], explanation, probabilities[place] if request.probabilities else None)

    def _answer_failed(self, rows: Sequence[Row], error: Exception) -> None:
        out_of_memory = _is_out_of_memory(error)
        if len(rows) > 1:
            half = len(rows) // 2
            if out_of_memory:
                self._chunk_rows = half
                log.warning("event=out_of_memory rows=%d chunk_rows=%d", len(rows), half)
                _free(self._device)
            self._answer(rows[:half])
            self._answer(rows[half:])
            return
        (row,) = rows
        name = row.work.model.name
        if out_of_memory:
            log.error('event=out_of_memory model="%s" rows=1', name)
            _free(self._device)
            row.work.fail(row, ResourceExhausted(f'model "{name}": out of device memory on one example'))
            return
        log.error('event=model_failed model="%s" example=%d', name, row.place, exc_info=error)
        row.work.fail(row, Internal(f'model "{name}" failed on example {row.place}; the server\'s log has the cause'))


def _fault(row: Row, model: Model, map_: Array, explanation: Explanation) -> SidelightError | None:
    if row.target is not None and row.target >= model.class_count:
        return InvalidArgument(
            f'target: class index {row.target}, model "{model.name}" has 0 to {model.class_count - 1}'
        )
    if is_finite(map_) and math.isfinite(explanation.probability) and math.isfinite(explanation.score):
        return None
    return Internal(f'model "{model.name}": output or gradient is not finite for example {row.place}')


def _is_saturated(probability: float) -> bool:
    return probability * (1 - probability) < scores.SATURATION


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _free(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
