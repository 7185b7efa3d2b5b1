"""A chunk: rows that run together, from staging to maps. On the thread that owns the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from . import scores
from .attribution import Array, Explanation, Score
from .errors import Internal, InvalidArgument, SidelightError
from .kernel import Gradients
from .methods import gradient
from .staging import Staging, is_finite
from .work import Row


@dataclass(frozen=True, slots=True)
class Explained:
    """A row's answer. The arrays are good until the next chunk."""

    map: Array  # [H, W], or [C, H, W] without channel reduction
    explanation: Explanation
    probabilities: NDArray[np.float32] | None  # [K], where they were asked for


Outcome = Explained | SidelightError


def explain(rows: Sequence[Row], staging: Staging) -> list[Outcome]:
    """Return each row's answer, or what is wrong with it alone. Raises whatever the model raises."""
    model = rows[0].work.model
    pixels = rows[0].example.dtype == np.uint8
    dtype = np.dtype(np.uint8) if pixels else model.staged_dtype
    inputs = model.inputs(staging.to_device([row.example for row in rows], dtype=dtype))
    answer = model.kernel.run(inputs, [row.target for row in rows], [row.work.request.score for row in rows])
    model.learn_class_count(answer.probabilities.shape[1])
    maps = _maps(rows, inputs, answer, staging)
    explanations = _explanations(rows, answer)
    probabilities = None
    if any(row.work.request.probabilities for row in rows):
        probabilities = answer.probabilities.float().cpu().numpy()  # [n, K]
    return [
        _fault(row, map_, explanation)
        or Explained(
            map_,
            explanation,
            probabilities[place] if probabilities is not None and row.work.request.probabilities else None,
        )
        for place, (row, map_, explanation) in enumerate(zip(rows, maps, explanations, strict=True))
    ]


def _maps(rows: Sequence[Row], inputs: torch.Tensor, answer: Gradients, staging: Staging) -> list[Array]:
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
        host = staging.to_host(finished.float())
        for place, map_ in zip(places, host if whole else host.copy(), strict=True):
            maps[place] = map_
    return maps


def _explanations(rows: Sequence[Row], answer: Gradients) -> list[Explanation]:
    # One small tensor crosses the bus instead of four: each copy would wait for the device.
    probability = answer.probabilities.gather(1, answer.predicted[:, None])[:, 0]  # [n]
    wide = torch.float64 if answer.scores.dtype == torch.float64 else torch.float32  # holds every class number exactly
    facts = torch.stack([each.to(wide) for each in (answer.predicted, answer.explained, answer.scores, probability)])
    return [
        Explanation(
            predicted=int(predicted),
            probability=probable,
            explained=int(explained),
            score=score,
            saturated=row.work.request.score is Score.PROBABILITY and score * (1 - score) < scores.SATURATION,
            geometry=row.work.prepared.geometries[row.place],
        )
        for row, predicted, explained, score, probable in zip(rows, *facts.tolist(), strict=True)
    ]


def _fault(row: Row, map_: Array, explanation: Explanation) -> SidelightError | None:
    model = row.work.model
    if row.target is not None and row.target >= model.class_count:
        return InvalidArgument(
            f'target: class index {row.target}, model "{model.name}" has 0 to {model.class_count - 1}'
        )
    if is_finite(map_) and math.isfinite(explanation.probability) and math.isfinite(explanation.score):
        return None
    return Internal(f'model "{model.name}": output or gradient is not finite for example {row.place}')
