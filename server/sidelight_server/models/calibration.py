"""Calibration: measures how many rows a chunk should have, at load and later, between the chunks of requests."""

import bisect
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..compute.kernel import Kernel, KernelOutput
from ..compute.saved_memory import SavedMemory
from ..compute.torch_device import free_memory
from ..domain import PREDICTED, Array

if TYPE_CHECKING:
    from .model import Model

DEFAULT_CHUNK_ROWS = 8  # where nothing can be measured
MAX_MEASURED_ROWS = {"cuda": 256, "cpu": 32, "mps": 32}
SHARE_OF_BEST = 0.95
PAST_ITS_BEST = 0.9
RUNS = 2  # whose times must agree
AGREEMENT = 1.1
MAX_RUNS = 6  # where they do not, because something else needs the device
MAX_RUNS_S = 1.0  # after which no more runs are begun: a start must not take long on a busy machine
CHECKED_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class Trial:
    """A size of chunk that was measured, of a kernel with these options."""

    rows: int
    rows_per_second: float
    configuration: str
    chosen: bool = False


def choose_chunk_rows(
    model: "Model", *, max_chunk_s: float, device_memory_limit: int, known: Sequence[Trial] = ()
) -> tuple[int, tuple[Trial, ...]]:
    """Return the size of chunk to serve with, and what was measured.

    It is the smallest power of two from 8 up that reaches 95 % of the best measured rate; fewer only where 8 rows take
    longer than `max_chunk_s`, or more bytes than the limit by what runs of 1 and 2 rows took: the limit is never
    searched for by running into it, for a model server lives on the same device.

    `known` are an earlier call's measurements of the same model. The better rate of a size counts, since other work on
    the device can only slow a run down, and the size that was chosen then is the least that is chosen now.
    """
    if not _has_choice(model):
        only = _trial(model, model.at_most(max(model.adapter.least, DEFAULT_CHUNK_ROWS)))
        return only.rows, (replace(only, chosen=True),)
    room = model.at_most(_rows_of_memory(model, device_memory_limit or free_memory(model.kernel.device)))
    sizes = [1 << n for n in range(MAX_MEASURED_ROWS[model.kernel.device.type].bit_length())]
    fastest = {trial.rows: trial for trial in known}

    def tried(rows: int) -> Trial:
        new = _trial(model, rows)
        fastest[rows] = max(fastest.get(rows, new), new, key=lambda trial: trial.rows_per_second)
        return fastest[rows]

    trials = [tried(1)]

    def measured(rows: int) -> bool:
        """Try a size, unless it must be expected to be too much; a row alone is slower than among others."""
        if rows > room or rows / trials[-1].rows_per_second > 2 * max_chunk_s:
            return False
        trials.append(tried(rows))
        return trials[-1].rows_per_second >= PAST_ITS_BEST * max(trial.rows_per_second for trial in trials)

    for rows in sizes[sizes.index(DEFAULT_CHUNK_ROWS) :]:
        if not measured(rows):
            break
    fitting = [each for each in trials[1:] if _fits(each, max_chunk_s)]
    if not fitting:  # fewer than 8 then, and at the least a single one
        for rows in sizes[1 : sizes.index(DEFAULT_CHUNK_ROWS)]:
            measured(rows)
        less = [each for each in trials if each.rows < DEFAULT_CHUNK_ROWS]
        fitting = [max((each for each in less if _fits(each, max_chunk_s)), key=_rows, default=trials[0])]
    best = max(trial.rows_per_second for trial in fitting)
    chosen = next(trial.rows for trial in fitting if trial.rows_per_second >= SHARE_OF_BEST * best)
    chosen = max([chosen, *(trial.rows for trial in known if trial.chosen)])
    return chosen, tuple(replace(each, chosen=each.rows == chosen) for each in sorted(fastest.values(), key=_rows))


def can_grow(model: "Model") -> bool:
    """Say whether a model's size of chunk was measured, and larger ones can be."""
    most = model.at_most(MAX_MEASURED_ROWS[model.kernel.device.type])
    return model.is_measured and _has_choice(model) and model.set_chunk_rows < most


def _has_choice(model: "Model") -> bool:
    """Say whether a chunk may have other sizes: that fewer rows are not filled up, and that more can run at once."""
    return model.adapter.least <= 1 and not 0 < model.adapter.most <= DEFAULT_CHUNK_ROWS


def compare_exact(model: "Model") -> tuple[tuple[Trial, ...], float]:
    """Return what a kernel without the operator's options gives of the model, and how like its maps are to the model's.

    Where the model's own chunk was not measured yet, because the settings say its size, it is measured beside.
    Likeness is the mean of Spearman's rank correlations of maps of noise. Those of photographs may be less alike.
    """
    exact, rows = model.exact_kernel(), max(1, model.chunk_rows)
    inputs = model.inputs_like(rows)
    trial = Trial(rows, rows / _seconds(model, rows, kernel=exact), exact.summary)
    ours, theirs = (
        model.in_turn(functools.partial(_mapped, model, inputs, kernel)) for kernel in (model.kernel, exact)
    )
    chosen = () if model.warm_up else (replace(_trial(model, rows), chosen=True),)
    return (trial, *chosen), float(np.mean([_rank_correlation(a, b) for a, b in zip(ours, theirs, strict=True)]))


def _mapped(model: "Model", inputs: Tensor, kernel: Kernel) -> Array:
    answer = _run(model, inputs, kernel=kernel)
    assert answer.gradients is not None  # noqa: S101
    maps: Array = answer.gradients.abs().amax(dim=1).flatten(1).double().cpu().numpy()  # [n, H × W]
    return maps


def _rank_correlation(a: Array, b: Array) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if len(a) > 1 else 1.0


def _trial(model: "Model", rows: int) -> Trial:
    return Trial(rows, rows / _seconds(model, rows), model.kernel.summary)


def _fits(trial: Trial, max_chunk_s: float) -> bool:
    return trial.rows / trial.rows_per_second <= max_chunk_s


def _rows(trial: Trial) -> int:
    return trial.rows


def same_bytes(model: "Model", rows: int) -> bool:
    """Say whether an example gets the same bytes in every run, position and chunk of `rows`."""
    for seed in range(CHECKED_EXAMPLES):
        example = model.inputs_like(1, seed=seed)[0]
        said: list[list[Tensor]] = []
        for place in range(rows):
            neighbors = model.inputs_like(rows, seed=CHECKED_EXAMPLES + seed * rows + place)
            neighbors[place] = example
            said += [model.in_turn(functools.partial(_said, model, neighbors, place)) for _ in range(2)]
        if any(not torch.equal(a, b) for each in said for a, b in zip(each, said[0], strict=True)):
            return False
    return True


def neighbor_difference(model: "Model") -> float:
    """Return how far an example's gradient moves in a full chunk, as a share of its largest element.

    The most of a few random examples. Sums in another order round otherwise, about 1e-6; a rectifier whose input is
    that near to zero switches, and then a part of the gradient comes or goes.
    """
    rows = model.chunk_rows
    inputs = model.inputs_like(rows)
    together = model.in_turn(functools.partial(_run, model, inputs)).gradients
    assert together is not None  # noqa: S101
    worst = 0.0
    for place in range(0, rows, max(1, rows // CHECKED_EXAMPLES)):
        alone = model.in_turn(functools.partial(_run, model, inputs[place : place + 1])).gradients
        assert alone is not None  # noqa: S101
        moved, largest = (each.abs().max().double() for each in (together[place] - alone[0], alone[0]))
        worst = max(worst, float(moved / largest.clamp_min(1e-300)))
    return worst


def _rows_of_memory(model: "Model", limit: int) -> int:
    one, two = (model.in_turn(functools.partial(_bytes, model, rows)) for rows in (1, 2))
    a_row = max(1, two - one)
    return max(1, (limit - max(0, one - a_row)) // a_row)


def _bytes(model: "Model", rows: int) -> int:
    """Return what a run takes: on a GPU at its peak; elsewhere what its graph keeps, the largest part of that."""
    inputs = model.inputs_like(rows)
    if model.kernel.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(inputs.device)
        before = torch.cuda.memory_allocated(inputs.device)
        _run(model, inputs)
        return torch.cuda.max_memory_allocated(inputs.device) - before
    with SavedMemory() as kept:
        _run(model, inputs)
    return kept.n_bytes + 2 * inputs.nbytes


def _seconds(model: "Model", rows: int, *, kernel: Kernel | None = None) -> float:
    """Return what the fastest run takes, of as many as are needed for two to agree; the first, a cold one, aside."""
    inputs = model.inputs_like(rows)

    def run() -> float:
        return model.in_turn(lambda: _timed(model, inputs, kernel=kernel))

    run()
    times = sorted(run() for _ in range(RUNS))
    while times[RUNS - 1] > AGREEMENT * times[0] and len(times) < MAX_RUNS and sum(times) < MAX_RUNS_S:
        bisect.insort(times, run())
    return times[0]


def _run(model: "Model", inputs: Tensor, *, kernel: Kernel | None = None) -> KernelOutput:
    resolved_targets, scores = [PREDICTED] * len(inputs), [model.scores[0]] * len(inputs)
    answer = (kernel or model.kernel).run(inputs, resolved_targets, scores, gradient=model.serves_gradients)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    return answer


def _timed(model: "Model", inputs: Tensor, *, kernel: Kernel | None) -> float:
    began = time.perf_counter()
    _run(model, inputs, kernel=kernel)
    return time.perf_counter() - began


def _said(model: "Model", inputs: Tensor, place: int) -> list[Tensor]:
    answer = _run(model, inputs)
    looked = model.kernel.run(inputs, [PREDICTED] * len(inputs), [model.scores[0]] * len(inputs), gradient=False)
    said = (answer.gradients, answer.scores, answer.probabilities, looked.probabilities)
    return [each[place] for each in said if each is not None]
