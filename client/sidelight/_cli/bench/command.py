"""The command `sidelight bench`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ... import __version__
from ..._clients.core import TIMEOUT_S
from ...exceptions import InvalidArgument
from ...results.server_info import ModelInfo
from ..options import (
    DEFAULT_ADDRESS,
    Address,
    Connector,
    Explanation,
    ModelName,
    Timeout,
    connection,
    explanation,
    with_options,
)
from .measurement import Bench, Plan
from .options import expect, loads, numbers, windows
from .plot import check_plot, plot
from .report import bench_facts, describe, progress, report_bench
from .traffic import Sent, Shape, Traffic, batches_of_files, random_batches

INTERRUPTED = 130  # 128 + SIGINT, as in a shell


@with_options(measured_loads=loads, measured_windows=windows, explained=explanation, connect_to=connection)
def bench(
    images: Annotated[list[Path] | None, typer.Argument(help="Picture files. Default: send noise.")] = None,
    *,
    address: Address = DEFAULT_ADDRESS,
    measured_loads: tuple[dict[str, Any], dict[str, Any]],
    batch: Annotated[int, typer.Option(help="Images per request.", min=1)] = 1,
    measured_windows: dict[str, Any],
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Send pictures as pixel arrays of the model's input size.")
    ] = False,
    shape: Annotated[str | None, typer.Option(help="Send noise as float arrays of this shape, C,H,W.")] = None,
    model: ModelName = None,
    explained: Explanation,
    timeout: Timeout = TIMEOUT_S,
    shared_memory: Annotated[bool, typer.Option("--shared-memory", help="Send arrays through shared memory.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of random arrivals.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all results to this JSON file.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw a plot into this file, such as plot.png.")
    ] = None,
    connect_to: Connector,
) -> None:
    """Measure a server under load: throughput, latency, and the time spent in each stage.

    Each load is measured until three windows in a row agree. Exits with 1 if they never do, or if a load has no answer.
    """
    expect(shape is None or not (images or pixels), "--shape", "only without pictures and --pixels")
    expect(not pixels or bool(images), "--pixels", "only with pictures")
    _check_files(json_file, plot_file)
    noise_shape = _shape(shape)
    loads_of_plan, way = measured_loads
    plan = Plan(
        address=address,
        **loads_of_plan,
        **measured_windows,
        seed=seed,
        shared_memory=shared_memory,
        connect_to=connect_to,
    )
    with plan.connect() as client:
        server = client.info()
        batches = _batches(images or [], batch, client.model(model), pixels=pixels, shape=noise_shape, seed=seed)
        traffic = Traffic(batches, model, explained=explained, timeout_s=timeout, **way)
        answer = traffic.try_out(client)
    console, measured = Console(), Bench(plan, traffic)
    with progress(console, measured) as watch:
        measured.run(watch)
    report_bench(console, measured, answer)
    if json_file is not None:
        facts = bench_facts(measured, server, answer, client_version=__version__)
        json_file.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot(plot_file, measured.results, title=describe(traffic, answer))
    if not measured.is_whole:
        raise typer.Exit(INTERRUPTED if measured.interrupted else 1)


def _check_files(json_file: Path | None, plot_file: Path | None) -> None:
    """Reject files that could not be written once the measurement is over."""
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        expect(file is None or file.absolute().parent.is_dir(), option, f"a file in an existing folder, got {file}")
    if plot_file is not None:
        check_plot(plot_file)


def _batches(
    paths: list[Path], batch: int, model: ModelInfo, *, pixels: bool, shape: Shape | None, seed: int
) -> list[Sent]:
    if not paths:
        return random_batches(batch, model, shape=shape, seed=seed)
    if pixels and model.input_size is None:
        raise InvalidArgument(f'--pixels: model "{model.name}" has no input size')
    return batches_of_files(paths, batch, size=model.input_size if pixels else None)


def _shape(text: str | None) -> Shape | None:
    if text is None:
        return None
    sizes = numbers(text, int, "--shape")
    expect(len(sizes) == 3, "--shape", f"C,H,W, got {text!r}")
    channels, height, width = sizes
    return channels, height, width
