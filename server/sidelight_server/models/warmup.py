"""Warm-up: calibrates a model's chunk size and checks that the model supports its settings."""

import logging

from ..compute.kernel import Kernel
from ..errors import ConfigurationError
from ..telemetry.logs import Event
from .calibration import can_grow, choose_chunk_rows, compare_exact, neighbor_difference, rank_correlation, same_bytes
from .model import Model
from .trial.checks import is_batch_dependent

log = logging.getLogger("sidelight")

# Rounding errors change a map by at most 4e-6 of its maximum.
LARGE_DIFFERENCE = 1e-4


def apply_fixed_size(model: Model) -> None:
    """Apply the settings that fix a model's chunk size; otherwise `warm_up` measures it."""
    settings = model.settings
    if settings.reproducible:
        if len(list(model.kernels)) > 1:
            raise ConfigurationError("method_precision: a reproducible model has one precision; unset one of the two")
        most = model.adapter.most
        if most and settings.reproducible_rows > most:
            raise ConfigurationError(
                f'reproducible_rows: got {settings.reproducible_rows}, but model "{model.name}" takes {most} at once'
            )
        model.padded_rows = model.chunk_rows = settings.reproducible_rows
    elif settings.max_chunk_rows and not model.is_batch_dependent:
        model.chunk_rows = model.at_most(settings.max_chunk_rows)


def warm_up(model: Model, *, before: Model | None = None) -> None:
    """Measure a model's chunk size, and check its settings. Runs on the device in `Model.in_turn`.

    A model whose weights have the same shapes as those of the version `before` keeps that version's size: measuring
    while requests run would be less accurate and delay them. Raises `ConfigurationError` if the model does not support
    its settings.
    """
    settings = model.settings
    if settings.reproducible:
        _check_reproducible(model, settings.reproducible_rows)
    elif model.is_tried and not settings.max_chunk_rows and not model.is_batch_dependent:
        if before is not None and before.shapes == model.shapes and not before.is_batch_dependent:
            model.chunk_rows, model.warm_up = before.set_chunk_rows, before.warm_up
            model.is_measured = before.is_measured
        else:
            model.chunk_rows, model.warm_up = choose_chunk_rows(
                model, max_chunk_s=settings.max_chunk_s, device_memory_limit=settings.device_memory_limit
            )
            model.is_measured = True
        if not same_bytes(model, 1):
            model.chunk_rows, model.is_measured = 1, False
            message = "each run of the same input gives different bytes: rows run alone"
            log.warning(Event("runs_differ", model=model.name, message=message))
    if model.is_tried and not settings.reproducible and not model.is_batch_dependent and model.chunk_rows > 1:
        _check_with_neighbors(model)
    _measure_neighbors(model)
    if model.is_tried and model.serves_gradients:
        exact = next((kernel for kernel in model.kernels if kernel.options.is_exact), None) or model.exact_kernel()
        _measure_fidelity(model, exact)
        if not model.kernel.options.is_exact and before is None:
            _measure_gain(model, exact)


def measure_again(model: Model) -> None:
    """Measure a model's chunk size again, if it was measured at load. It may grow, but never shrinks.

    The first measurement may have been slowed down by other processes.
    """
    if not can_grow(model):
        return
    settings, before = model.settings, model.set_chunk_rows
    known = [rate for rate in model.warm_up if rate.configuration == model.kernel.summary]
    others = [rate for rate in model.warm_up if rate not in known]
    rows, rates = choose_chunk_rows(
        model, max_chunk_s=settings.max_chunk_s, device_memory_limit=settings.device_memory_limit, known=known
    )
    old_rates, model.warm_up = model.warm_up, (*others, *rates)
    if rows == before:
        return
    model.chunk_rows = rows
    try:
        _measure_neighbors(model)
    except BaseException:  # the difference that is reported belongs to the old size
        model.chunk_rows, model.warm_up = before, old_rates
        raise
    log.info(Event("chunk_rows_grown", model=model.name, before=before, chunk_rows=rows))


def _check_with_neighbors(model: Model) -> None:
    """Make rows run alone if an example's outputs depend on its neighbors in a chunk.

    The autograd graph of the trial does not show a dependence through detached statistics.
    """
    try:
        depends = is_batch_dependent(
            model.kernel.outputs_of,
            model.inputs_like(1),
            in_turn=model.in_turn,
            most=model.chunk_rows,
            dtype=model.kernel.compute_dtype,
        )
    except Exception as error:  # raised by the model: it does not accept such a batch
        log.warning(Event("neighbors_failed", model=model.name, message=f"{type(error).__name__}: {error}"))
        depends = True
    if depends:
        model.run_rows_alone()


def _measure_neighbors(model: Model) -> None:
    """Measure how much neighbors in a chunk change a map; log a warning if it is more than rounding error."""
    if not (model.is_tried and model.serves_gradients):
        return
    alone = model.settings.reproducible or model.is_batch_dependent or model.chunk_rows == 1
    model.neighbor_difference = 0.0 if alone else neighbor_difference(model)
    if model.neighbor_difference > LARGE_DIFFERENCE:
        message = "maps differ by this share of their maximum with the neighbors in a chunk; reproducible prevents it"
        log.warning(Event(
            "neighbors_differ", model=model.name, difference=float(f"{model.neighbor_difference:.1e}"), message=message
        ))  # fmt: skip


def _measure_fidelity(model: Model, exact: Kernel) -> None:
    """Measure the rank correlation of each kernel's maps with the exact kernel's.

    Raises `ConfigurationError` if one is less than the setting `fidelity`.
    """
    least = model.settings.fidelity
    for kernel in model.kernels:
        correlation = 1.0 if kernel.options.is_exact else rank_correlation(model, kernel, exact)
        model.fidelity[kernel.summary] = correlation
        if not kernel.options.is_exact:
            log.info(Event(
                "compared", model=model.name, configuration=kernel.summary, rank_correlation=round(correlation, 4)
            ))  # fmt: skip
        if not correlation >= least:  # also if it is NaN
            raise ConfigurationError(
                f'fidelity: maps of model "{model.name}" in {kernel.summary} have a rank correlation of '
                f"{correlation:.4f} with exact ones, the setting requires {least}; choose another precision, such as "
                "mixed"
            )


def _measure_gain(model: Model, exact: Kernel) -> None:
    """Measure the speed without the operator's options; log all rates, and warn if the options are slower."""
    rates = compare_exact(model, exact)
    model.warm_up = (*rates, *model.warm_up)
    for rate in model.warm_up:
        log.info(Event(
            "tried", model=model.name, configuration=rate.configuration, rows=rate.rows,
            rows_per_s=round(rate.rows_per_second, 1), chosen=rate.chosen,
        ))  # fmt: skip
    chosen = next(rate for rate in model.warm_up if rate.chosen)
    if chosen.rows_per_second < (plain := rates[0]).rows_per_second:
        message = f"slower than {plain.configuration}, which runs {plain.rows_per_second:.1f} rows/s; leave it unset"
        log.warning(Event("options_slow", model=model.name, configuration=chosen.configuration, message=message))


def _check_reproducible(model: Model, rows: int) -> None:
    """Raise `ConfigurationError` unless the model gives the same bytes in every chunk of `rows` rows."""
    if rows > 1 and (not model.is_tried or model.is_batch_dependent):
        why = "has rows that depend on each other" if model.is_batch_dependent else "has no input size to check it with"
        raise ConfigurationError(f'reproducible_rows: got {rows}, but model "{model.name}" {why}; set it to 1')
    if model.is_tried and not same_bytes(model, rows):
        raise ConfigurationError(
            f'reproducible_rows: got {rows}, but model "{model.name}" gives an example other bytes at another index '
            "or with other neighbors; set it to 1"
            if rows > 1
            else f'reproducible: model "{model.name}" gives other bytes each time it runs on the same input'
        )
