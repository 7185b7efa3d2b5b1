"""A chunk: rows that run together. It is launched, and read once the device has finished it."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..compute.kernel import KernelOutput
from ..compute.max_abs import largest_absolute
from ..compute.staging import Staging
from ..compute.weights import Identity
from ..domain import PREDICTED, Array
from ..errors import Internal
from ..methods.method import RowOutput
from ..models.model import Model
from .active_request import ActiveRequest
from .example_run import Result, Row


class Chunk:
    """Rows of one key at the device. Raises whatever the model raises, here or in `read`."""

    def __init__(self, rows: Sequence[tuple[ActiveRequest, Row]], staging: Staging) -> None:
        self.began_s = time.monotonic()
        active, first = rows[0]
        model = active.model
        self._model, self._identity = model, model.identify()
        padding = max(0, model.padded_rows - len(rows))
        self._inputs = _inputs([row for _, row in rows], active, staging, padding=padding)
        model.find_out(self._inputs)
        model.check_memory(self._inputs)
        if model.is_batch_dependent and len(rows) > model.chunk_rows:
            raise Internal("rows touch each other")  # as these showed: they are split until each is alone
        self._answer = model.kernel.run(
            self._inputs,
            [row.example_run.resolved for _, row in rows] + [PREDICTED] * padding,
            [active.request.score for active, _ in rows] + [active.request.score] * padding,
            probe=active.request.method.probe,
            gradient=first.sweep.gradient,
            plain_head=active.request.plain_head,
        )
        model.learn_output(self._answer.output_shape)
        self._facts = staging.leave(_facts(self._answer))
        # All at once, and on their way while the device computes the next chunk: a map at a time would do neither.
        self._mapped = [_is_largest_absolute(active) for active, _ in rows]
        gradients = self._answer.gradients
        self._maps = None
        if gradients is not None and any(self._mapped):
            self._maps = staging.leave(largest_absolute(gradients[: len(rows)]))

    @property
    def identity(self) -> Identity:
        """What has computed it, once it is read."""
        return self._identity if self._model.is_identified else Identity()

    def read(self) -> list[RowOutput]:
        """Return what each row gave."""
        answer, rows = self._answer, range(len(self._mapped))
        maps = self._maps.wait() if self._maps else None
        predicted, explained, scores, probable, is_dead = self._facts.wait().tolist()
        return [
            RowOutput(
                input=self._inputs[i],
                predicted=int(predicted[i]),
                probability=probable[i],
                explained=int(explained[i]),
                score=scores[i],
                is_dead=bool(is_dead[i]),
                probabilities=answer.probabilities[i],
                gradient=None if answer.gradients is None else answer.gradients[i],
                activation=None if answer.activations is None else answer.activations[i],
                map=maps[i] if maps is not None and self._mapped[i] else None,
            )
            for i in rows
        ]


def _is_largest_absolute(active: ActiveRequest) -> bool:
    request = active.request
    in_float64 = request.exact and active.model.staged_dtype == np.float64
    return request.method.is_largest_absolute(request.channels) and not active.prepared.top_k and not in_float64


def _inputs(rows: Sequence[Row], active: ActiveRequest, staging: Staging, *, padding: int) -> Tensor:
    """Return the points of a chunk, [n, C, H, W]: examples staged together, all others built where they lie.

    Always fresh memory from its first byte on: a view may be aligned otherwise, and choose other vector instructions.
    """
    model = active.model
    staged: dict[np.dtype[np.generic], list[int]] = {}
    for place, row in enumerate(rows):
        if row.sweep.point is None:
            staged.setdefault(row.example_run.example.dtype, []).append(place)
    if len(staged) == 1 and len(next(iter(staged.values()))) == len(rows) and not padding:
        return _staged(rows, model, staging)
    shape = (len(rows) + padding, *active.prepared.shape)
    inputs = torch.empty(shape, dtype=model.kernel.dtype, device=model.kernel.device)
    inputs[len(rows) :] = 0
    for places in staged.values():
        inputs[places] = _staged([rows[place] for place in places], model, staging)
    for place, row in enumerate(rows):
        if row.sweep.point is not None:
            inputs[place] = row.sweep.point(row.index)
    return inputs


def _staged(rows: Sequence[Row], model: Model, staging: Staging) -> Tensor:
    dtype = np.dtype(np.uint8) if rows[0].example_run.example.dtype == np.uint8 else model.staged_dtype
    return model.inputs(staging.to_device([row.example_run.example for row in rows], dtype=dtype))


def _facts(answer: KernelOutput) -> Tensor:
    """Return what the host must know of each row, [5, n]: one small tensor crosses the bus instead of five."""
    probability = answer.probabilities.gather(1, answer.predicted[:, None])[:, 0]  # [n]
    wide = torch.float64 if answer.scores.dtype == torch.float64 else torch.float32  # holds every class number exactly
    facts = answer.predicted, answer.explained, answer.scores, probability, answer.is_dead
    return torch.stack([each.to(wide) for each in facts])


def to_host(results: Sequence[Result], staging: Staging) -> list[Array]:
    """Return each result's maps, [k, …], on the host. Those of one shape that are not there cross the bus together."""
    alike: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    maps: list[Array] = [np.empty(0)] * len(results)
    for place, result in enumerate(results):
        first, *others = result.maps
        wide = first.dtype if result.is_exact else torch.float32
        if first.device.type == "cpu" and not others:
            maps[place] = first[None].to(wide).detach().numpy()
        else:
            alike.setdefault((first.shape, wide), []).append(place)
    for (_, wide), places in alike.items():
        stacked = torch.stack([map_ for place in places for map_ in results[place].maps])
        host = staging.to_host(stacked.to(wide))
        for place in places:
            n = len(results[place].maps)
            maps[place], host = host[:n], host[n:]
    return maps
