"""A running chunk: launches the rows that `scheduler` has chosen as one pass, and reads the output of each row."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...compute.max_abs import largest_absolute
from ...compute.outputs.interpretation import KernelOutput
from ...compute.staging import HostCopy, Staging, magnitudes
from ...compute.weights import Identity
from ...domain import PREDICTED
from ...errors import Internal
from ...methods.channels import Channels
from ...methods.method import HostMaps, RowOutput
from ...models.model import Model
from ...telemetry.call_record import MAX_CHUNKS, ChunkTimes
from ..active_request import ActiveRequest
from ..example_run import Row

# How the gradients of a whole chunk, [n, C, H, W], become maps: by the reductions that `Method.reduction` returns.
_REDUCED: dict[Channels, Callable[[Tensor], Tensor]] = {
    Channels.NONE: lambda gradients: gradients.to(torch.float32),
    Channels.MAX_ABS: largest_absolute,
}


class RunningChunk:
    """Rows of one key, launched on the device. The constructor and `read` raise whatever the model raises."""

    def __init__(self, rows: Sequence[tuple[ActiveRequest, Row]], staging: Staging) -> None:
        self.began_s = time.monotonic()
        active, first = rows[0]
        model = active.model
        self._model, self._identity = model, model.identity.identify()
        padding = max(0, model.padded_rows - len(rows))
        self._inputs = _inputs([row for _, row in rows], active, staging, padding=padding)
        model.introspect(self._inputs)
        model.check_memory(self._inputs)
        if model.is_batch_dependent and len(rows) > model.chunk_rows:
            raise Internal("rows depend on each other")  # just detected; the worker splits the chunk
        self._answer = active.kernel.run(
            self._inputs,
            [row.example_run.resolved for _, row in rows] + [PREDICTED] * padding,
            [active.request.score for active, _ in rows] + [active.request.score] * padding,
            probe=active.request.method.probe,
            gradient=first.sweep.gradient,
            plain_head=active.request.plain_head,
        )
        model.learn_output(self._answer.output_shape)
        self._facts = staging.to_host(_facts(self._answer))
        # All maps at once, copied while the device computes the next chunk.
        self._reductions = [_reduction(active) for active, _ in rows]
        gradients = self._answer.gradients
        self._maps = {
            reduction: staging.to_host(_REDUCED[reduction](gradients[: len(rows)]))
            for reduction in set(self._reductions)
            if reduction and gradients is not None
        }

    @property
    def identity(self) -> Identity:
        """Identity of the model that computed the chunk. Valid after `read`."""
        return self._identity if self._model.identity.is_current else Identity()

    def record_times(self, requests: Iterable[ActiveRequest], ended_s: float) -> None:
        """Record its launch and its end in the requests that collect chunk times. Call it before they are answered."""
        collecting = {id(active.chunks): active.chunks for active in requests if active.chunks is not None}
        for chunks in collecting.values():
            if len(chunks) < MAX_CHUNKS:
                chunks.append(ChunkTimes(self.began_s, ended_s, len(self._reductions)))

    def read(self) -> list[RowOutput]:
        """Wait for the device and return the output of each row."""
        answer = self._answer
        maps = {reduction: wait_for_maps(copy) for reduction, copy in self._maps.items()}
        predicted, explained, scores, probable, is_dead = self._facts.wait().tolist()
        # Unbound together: indexing each row would be one call of torch per row, which releases the GIL.
        inputs, probabilities = self._inputs.unbind(), answer.probabilities.unbind()
        gradients = answer.gradients.unbind() if answer.gradients is not None else (None,) * len(inputs)
        activations = answer.activations.unbind() if answer.activations is not None else (None,) * len(inputs)
        return [
            RowOutput(
                input=inputs[i],
                predicted=int(predicted[i]),
                probability=probable[i],
                explained=int(explained[i]),
                score=scores[i],
                is_dead=bool(is_dead[i]),
                probabilities=probabilities[i],
                gradient=gradients[i],
                activation=activations[i],
                maps=HostMaps(*maps[reduction], i, i + 1) if reduction in maps else None,
            )
            for i, reduction in enumerate(self._reductions)
        ]


def by_request(rows: Sequence[tuple[ActiveRequest, Row]]) -> list[tuple[ActiveRequest, Row]]:
    """Return the rows of a chunk with those of each request together: its maps then need no copy."""
    of: dict[ActiveRequest, list[tuple[ActiveRequest, Row]]] = {}
    for row in rows:
        of.setdefault(row[0], []).append(row)
    return list(itertools.chain.from_iterable(of.values()))


def _reduction(active: ActiveRequest) -> Channels | None:
    """Return how the chunk reduces a request's gradients to maps; None if its method does that."""
    request = active.request
    in_float64 = request.exact and active.model.staged_dtype == np.float64
    return None if active.prepared.top_k or in_float64 else request.method.reduction(request.channels)


def _inputs(rows: Sequence[Row], active: ActiveRequest, staging: Staging, *, padding: int) -> Tensor:
    """Return the points of a chunk, [n, C, H, W]: examples are staged together, other points built on the device.

    Always newly allocated: a view may have another alignment, and so other vector instructions and other last bits.
    """
    model = active.model
    staged: dict[np.dtype[np.generic], list[int]] = {}
    for index, row in enumerate(rows):
        if row.sweep.point is None:
            staged.setdefault(row.example_run.example.dtype, []).append(index)
    if len(staged) == 1 and len(next(iter(staged.values()))) == len(rows) and not padding:
        return _stage(rows, model, staging)
    shape = (len(rows) + padding, *active.prepared.shape)
    inputs = torch.empty(shape, dtype=model.kernel.dtype, device=model.kernel.device)
    inputs[len(rows) :] = 0
    for indices in staged.values():
        inputs[indices] = _stage([rows[index] for index in indices], model, staging)
    for index, row in enumerate(rows):
        if row.sweep.point is not None:
            inputs[index] = row.sweep.point(row.index)
    return inputs


def _stage(rows: Sequence[Row], model: Model, staging: Staging) -> Tensor:
    dtype = np.dtype(np.uint8) if rows[0].example_run.example.dtype == np.uint8 else model.staged_dtype
    return model.inputs(staging.to_device([row.example_run.example for row in rows], dtype=dtype))


def _facts(answer: KernelOutput) -> Tensor:
    """Return the scalars of each row that the host needs, [5, n], as one tensor: one copy to the host, not five."""
    probability = answer.probabilities.gather(1, answer.predicted[:, None])[:, 0]  # [n]
    wide = torch.float64 if answer.scores.dtype == torch.float64 else torch.float32  # holds every class number exactly
    facts = answer.predicted, answer.explained, answer.scores, probability, answer.is_dead
    return torch.stack([each.to(wide) for each in facts])


def wait_for_maps(copy: HostCopy) -> tuple[NDArray[np.float32 | np.float64], NDArray[np.floating]]:
    """Wait for maps, and return them with the largest absolute value of each."""
    maps = copy.wait().numpy()
    return maps, magnitudes(maps)
