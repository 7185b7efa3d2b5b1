"""Calibration: measures the best chunk size of a model, at load and again later while its device is idle."""

import bisect
import functools
import operator
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..compute.kernel import Kernel
from ..compute.outputs.interpretation import KernelOutput
from ..compute.saved_memory import SavedMemory
from ..compute.torch_device import free_memory
from ..domain import PREDICTED, Array
from .chunk_size import DEFAULT_CHUNK_ROWS, ChunkRate
from .model import Model

MAX_MEASURED_ROWS = {"cuda": 256, "cpu": 32, "mps": 32}
SHARE_OF_BEST = 0.95  # share of the best rate that the chosen size must reach
PAST_ITS_BEST = 0.9  # larger sizes are not measured once the rate is below this share of the best
RUNS = 2  # number of runs whose times must agree
AGREEMENT = 1.1  # two times agree if their ratio is at most this
MAX_RUNS = 6  # limit of the runs if times do not agree, because something else uses the device
MAX_RUNS_S = 1.0  # no further runs after this: loading must not take long on a busy machine
CHECKED_EXAMPLES = 3


def choose_chunk_rows(
    model: Model, *, max_chunk_s: float, device_memory_limit: int, known: Sequence[ChunkRate] = ()
) -> tuple[int, tuple[ChunkRate, ...]]:
    """Return the chunk size to serve with, and all measurements.

    It is the smallest power of two from 8 up that reaches 95 % of the best measured rate. It is less than 8 only if 8
    rows take longer than `max_chunk_s` or more memory than the limit, extrapolated from runs of 1 and 2 rows. Runs
    never exceed the memory limit, because a model server may use the same device.

    `known` are earlier measurements of the same model. For each size the better rate counts, since other work on the
    device can only slow a run down, and the chosen size never becomes smaller than before.
    """
    if not _has_choice(model):
        only = _rate(model, model.at_most(max(model.adapter.least, DEFAULT_CHUNK_ROWS)))
        return only.rows, (replace(only, chosen=True),)
    room = model.at_most(_rows_of_memory(model, device_memory_limit or free_memory(model.kernel.device)))
    sizes = [1 << n for n in range(MAX_MEASURED_ROWS[model.kernel.device.type].bit_length())]
    fastest = {rate.rows: rate for rate in known}
    by_rows = operator.attrgetter("rows")

    def best_rate(rows: int) -> ChunkRate:
        """Measure a size; return the better of this rate and the known one."""
        new = _rate(model, rows)
        fastest[rows] = max(fastest.get(rows, new), new, key=lambda rate: rate.rows_per_second)
        return fastest[rows]

    rates = [best_rate(1)]

    def measure(rows: int) -> bool:
        """Measure a size unless it is expected to exceed a limit; return whether larger sizes may be faster."""
        if rows > room or rows / rates[-1].rows_per_second > 2 * max_chunk_s:
            return False
        rates.append(best_rate(rows))
        return rates[-1].rows_per_second >= PAST_ITS_BEST * max(rate.rows_per_second for rate in rates)

    for rows in sizes[sizes.index(DEFAULT_CHUNK_ROWS) :]:
        if not measure(rows):
            break
    fitting = [each for each in rates[1:] if _fits(each, max_chunk_s)]
    if not fitting:  # 8 rows do not fit: measure smaller sizes, at least a single row
        for rows in sizes[1 : sizes.index(DEFAULT_CHUNK_ROWS)]:
            measure(rows)
        less = [each for each in rates if each.rows < DEFAULT_CHUNK_ROWS]
        fitting = [max((each for each in less if _fits(each, max_chunk_s)), key=by_rows, default=rates[0])]
    best = max(rate.rows_per_second for rate in fitting)
    chosen = next(rate.rows for rate in fitting if rate.rows_per_second >= SHARE_OF_BEST * best)
    chosen = max([chosen, *(rate.rows for rate in known if rate.chosen)])
    return chosen, tuple(replace(each, chosen=each.rows == chosen) for each in sorted(fastest.values(), key=by_rows))


def can_grow(model: Model) -> bool:
    """Return whether a model's chunk size was measured and may become larger."""
    most = model.at_most(MAX_MEASURED_ROWS[model.kernel.device.type])
    return model.is_measured and _has_choice(model) and model.set_chunk_rows < most


def _has_choice(model: Model) -> bool:
    """Return whether different chunk sizes are possible: the model neither pads chunks nor limits them to 8 rows."""
    return model.adapter.least <= 1 and not 0 < model.adapter.most <= DEFAULT_CHUNK_ROWS


def compare_exact(model: Model, exact: Kernel) -> tuple[ChunkRate, ...]:
    """Measure a kernel without the operator's options, and the model's own chunk size if the settings fixed it."""
    rows = max(1, model.chunk_rows)
    rate = ChunkRate(rows, rows / _seconds(model, rows, kernel=exact), exact.summary)
    return (rate,) if model.warm_up else (rate, replace(_rate(model, rows), chosen=True))


def rank_correlation(model: Model, kernel: Kernel, exact: Kernel) -> float:
    """Return the mean Spearman rank correlation of two kernels' maps of random inputs.

    Maps of photographs may be less similar.
    """
    inputs = model.inputs_like(max(1, model.chunk_rows))
    ours, theirs = (model.in_turn(functools.partial(_make_maps, model, inputs, each)) for each in (kernel, exact))
    return float(np.mean([_rank_correlation(a, b) for a, b in zip(ours, theirs, strict=True)]))


def _make_maps(model: Model, inputs: Tensor, kernel: Kernel) -> Array:
    answer = _run(model, inputs, kernel=kernel)
    assert answer.gradients is not None  # noqa: S101
    maps: Array = answer.gradients.abs().amax(dim=1).flatten(1).double().cpu().numpy()  # [n, H × W]
    return maps


def _rank_correlation(a: Array, b: Array) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if len(a) > 1 else 1.0


def _rate(model: Model, rows: int) -> ChunkRate:
    return ChunkRate(rows, rows / _seconds(model, rows), model.kernel.summary)


def _fits(rate: ChunkRate, max_chunk_s: float) -> bool:
    return rate.rows / rate.rows_per_second <= max_chunk_s


def same_bytes(model: Model, rows: int) -> bool:
    """Return whether an example gets the same bytes in every run, at every index and with any neighbors."""
    for seed in range(CHECKED_EXAMPLES):
        example = model.inputs_like(1, seed=seed)[0]
        outputs: list[list[Tensor]] = []
        for index in range(rows):
            neighbors = model.inputs_like(rows, seed=CHECKED_EXAMPLES + seed * rows + index)
            neighbors[index] = example
            outputs += [model.in_turn(functools.partial(_outputs_of, model, neighbors, index)) for _ in range(2)]
        if any(not torch.equal(a, b) for each in outputs for a, b in zip(each, outputs[0], strict=True)):
            return False
    return True


def neighbor_difference(model: Model) -> float:
    """Return how much an example's gradient changes in a full chunk, relative to its largest element.

    The maximum over a few random examples. Another order of summation changes results by about 1e-6; a ReLU whose input
    is that close to zero may switch, which changes a part of the gradient.
    """
    rows = model.chunk_rows
    inputs = model.inputs_like(rows)
    together = model.in_turn(functools.partial(_run, model, inputs)).gradients
    assert together is not None  # noqa: S101
    worst = 0.0
    for index in range(0, rows, max(1, rows // CHECKED_EXAMPLES)):
        alone = model.in_turn(functools.partial(_run, model, inputs[index : index + 1])).gradients
        assert alone is not None  # noqa: S101
        moved, largest = (each.abs().max().double() for each in (together[index] - alone[0], alone[0]))
        worst = max(worst, float(moved / largest.clamp_min(1e-300)))
    return worst


def _rows_of_memory(model: Model, limit: int) -> int:
    one, two = (model.in_turn(functools.partial(_bytes, model, rows)) for rows in (1, 2))
    a_row = max(1, two - one)
    return max(1, (limit - max(0, one - a_row)) // a_row)


def _bytes(model: Model, rows: int) -> int:
    """Return the bytes that a run takes: on a GPU the peak, elsewhere what autograd saves, which is most of it."""
    inputs = model.inputs_like(rows)
    if model.kernel.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(inputs.device)
        before = torch.cuda.memory_allocated(inputs.device)
        _run(model, inputs)
        return torch.cuda.max_memory_allocated(inputs.device) - before
    with SavedMemory() as kept:
        _run(model, inputs)
    return kept.n_bytes + 2 * inputs.nbytes


def _seconds(model: Model, rows: int, *, kernel: Kernel | None = None) -> float:
    """Return the time of the fastest run, after one cold run and as many runs as it takes for two to agree."""
    inputs = model.inputs_like(rows)

    def timed() -> float:
        began = time.perf_counter()
        _run(model, inputs, kernel=kernel)
        return time.perf_counter() - began

    def run() -> float:
        return model.in_turn(timed)

    run()
    times = sorted(run() for _ in range(RUNS))
    while times[RUNS - 1] > AGREEMENT * times[0] and len(times) < MAX_RUNS and sum(times) < MAX_RUNS_S:
        bisect.insort(times, run())
    return times[0]


def _run(model: Model, inputs: Tensor, *, kernel: Kernel | None = None) -> KernelOutput:
    resolved_targets, scores = [PREDICTED] * len(inputs), [model.scores[0]] * len(inputs)
    answer = (kernel or model.kernel).run(inputs, resolved_targets, scores, gradient=model.serves_gradients)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    return answer


def _outputs_of(model: Model, inputs: Tensor, index: int) -> list[Tensor]:
    answer = _run(model, inputs)
    looked = model.kernel.run(inputs, [PREDICTED] * len(inputs), [model.scores[0]] * len(inputs), gradient=False)
    outputs = (answer.gradients, answer.scores, answer.probabilities, looked.probabilities)
    return [each[index] for each in outputs if each is not None]
