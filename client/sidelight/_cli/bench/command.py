"""The command `sidelight bench`: its options and their validation."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer
from rich.console import Console

from ... import __version__
from ..._clients.core import TIMEOUT_S
from ..._inputs.enums import MapDtype, Score
from ..._inputs.targets import Choice
from ...exceptions import InvalidArgument, SidelightError
from ...methods.method import Method
from ...methods.parsing import parse_method
from ...results.server_info import ModelInfo
from ..options import DEFAULT_ADDRESS, Connector
from .arrivals import Arrivals
from .measurement import N_OUTSTANDING, Bench, Plan
from .plot import check_plot, plot
from .report import bench_facts, progress, question, report_bench
from .statistics import PERCENTILES, STABLE_WINDOWS
from .traffic import Sent, Shape, Traffic, batches_of_files, random_batches

CONCURRENCY = "1,2,4,8"
INTERRUPTED = 130  # 128 + SIGINT, as in a shell

_Number = TypeVar("_Number", int, float)


def bench(
    images: Annotated[list[Path] | None, typer.Argument(help="Picture files. Default: send noise.")] = None,
    *,
    address: Annotated[
        str, typer.Option(help='The server: "host:port" or "unix:/path".', envvar="SIDELIGHT_ADDRESS")
    ] = DEFAULT_ADDRESS,
    mode: Annotated[Literal["unary", "stream"], typer.Option(help="Unary calls, or streams.")] = "unary",
    batch: Annotated[int, typer.Option(help="Images per request.", min=1)] = 1,
    concurrency: Annotated[
        str | None,
        typer.Option(help=f"Closed loop: callers, or streams, one number or several. Default: {CONCURRENCY}."),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loop instead: requests per second, one number or several.")
    ] = None,
    arrivals: Annotated[
        Arrivals | None, typer.Option(help="With --rate: evenly spaced (the default), or a Poisson process.")
    ] = None,
    outstanding: Annotated[
        int | None, typer.Option(help="With --rate: maximum number of unanswered calls.", min=1)
    ] = None,
    interval: Annotated[float, typer.Option(help="Length of a window in seconds.")] = 5.0,
    max_windows: Annotated[int, typer.Option(help="Maximum number of windows per load.", min=STABLE_WINDOWS)] = 10,
    duration: Annotated[
        float | None, typer.Option(help="Measure each load for this many seconds, stable or not.")
    ] = None,
    stability: Annotated[
        float, typer.Option(help="Maximum difference in percent between three stable windows.")
    ] = 10.0,
    stable_percentile: Annotated[int, typer.Option(help="The latency percentile to compare between windows.")] = 95,
    window: Annotated[
        int | None, typer.Option(help="With --mode stream: maximum number of unanswered images.", min=1)
    ] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Send pictures as pixel arrays of the model's input size.")
    ] = False,
    shape: Annotated[str | None, typer.Option(help="Send noise as float arrays of this shape, C,H,W.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name. Default: the server's default model.")] = None,
    target: Annotated[str | None, typer.Option(help="A class index or label. Default: the predicted class.")] = None,
    method: Annotated[
        str, typer.Option(help="The method, as for `sidelight attribute`: 'smoothgrad(samples=8)'.")
    ] = "gradient",
    score: Annotated[Score, typer.Option(help="The score to explain.")] = "probability",
    map_dtype: Annotated[
        MapDtype, typer.Option(help="Data type of the maps in responses; the smaller ones round.")
    ] = "float32",
    timeout: Annotated[float, typer.Option(help="Timeout for one request, in seconds.")] = TIMEOUT_S,
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
    is_streamed, is_open = mode == "stream", rate is not None
    _expect(concurrency is None or not is_open, "--concurrency", "only without --rate")
    _expect(arrivals is None or is_open, "--arrivals", "only with --rate")
    _expect(outstanding is None or (is_open and not is_streamed), "--outstanding", "only with --rate and --mode unary")
    _expect(window is None or is_streamed, "--window", "only with --mode stream")
    _expect(shape is None or not (images or pixels), "--shape", "only without pictures and --pixels")
    _expect(not pixels or bool(images), "--pixels", "only with pictures")
    for option, number in (("--interval", interval), ("--duration", duration), ("--stability", stability)):
        _expect(number is None or 0 < number < math.inf, option, f"a positive number, got {number}")
    _expect(stable_percentile in PERCENTILES, "--stable-percentile", f"one of {PERCENTILES}, got {stable_percentile}")
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        _expect(file is None or file.absolute().parent.is_dir(), option, f"a file in an existing folder, got {file}")
    if plot_file is not None:
        check_plot(plot_file)
    plan = Plan(
        address=address,
        callers=() if is_open else _numbers(CONCURRENCY if concurrency is None else concurrency, int, "--concurrency"),
        rates=() if rate is None else _numbers(rate, float, "--rate"),
        arrivals=arrivals or "constant",
        n_outstanding=outstanding or N_OUTSTANDING,
        interval_s=interval if duration is None else duration / STABLE_WINDOWS,
        max_windows=max_windows if duration is None else STABLE_WINDOWS,
        until_stable=duration is None,
        stability=stability / 100,
        stable_percentile=stable_percentile,
        seed=seed,
        shared_memory=shared_memory,
        connect_to=connect_to,
    )
    parsed_method, parsed_target, parsed_shape = _method(method), _target(target), _shape(shape)
    with plan.connect() as client:
        server = client.info()
        info = client.model(model)
        traffic = Traffic(
            _batches(images or [], batch, info, pixels=pixels, shape=parsed_shape, seed=seed),
            model,
            target=parsed_target,
            method=parsed_method,
            score=score,
            map_dtype=map_dtype,
            timeout_s=timeout,
            is_streamed=is_streamed,
            window=window,
        )
        answer = traffic.try_out(client)
    console, measured = Console(), Bench(plan, traffic)
    with progress(console, measured) as watch:
        measured.run(watch)
    report_bench(console, measured, answer)
    if json_file is not None:
        facts = bench_facts(measured, server, answer, client_version=__version__)
        json_file.write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if plot_file is not None:
        plot(plot_file, measured.results, title=question(traffic, answer))
    if not measured.is_whole:
        raise typer.Exit(INTERRUPTED if measured.interrupted else 1)


def _batches(
    paths: list[Path], batch: int, model: ModelInfo, *, pixels: bool, shape: Shape | None, seed: int
) -> list[Sent]:
    if not paths:
        return random_batches(batch, model, shape=shape, seed=seed)
    if pixels and model.input_size is None:
        raise InvalidArgument(f'--pixels: model "{model.name}" has no input size')
    return batches_of_files(paths, batch, size=model.input_size if pixels else None)


def _expect(is_right: bool, option: str, expected: str) -> None:
    if not is_right:
        raise typer.BadParameter(f"expected {expected}", param_hint=option)


def _numbers(text: str, number: type[_Number], option: str) -> tuple[_Number, ...]:
    """Parse positive numbers that are separated by commas."""
    try:
        numbers = tuple(map(number, text.split(",")))
    except ValueError:
        numbers = ()
    noun = "whole numbers" if number is int else "numbers"
    is_right = bool(numbers) and all(0 < each < math.inf for each in numbers)
    _expect(is_right, option, f"positive {noun} separated by commas, got {text!r}")
    return numbers


def _shape(text: str | None) -> Shape | None:
    if text is None:
        return None
    sizes = _numbers(text, int, "--shape")
    _expect(len(sizes) == 3, "--shape", f"C,H,W, got {text!r}")
    channels, height, width = sizes
    return channels, height, width


def _method(text: str) -> Method:
    try:
        return parse_method(text)
    except SidelightError as error:
        raise typer.BadParameter(error.message, param_hint="--method") from None


def _target(text: str | None) -> Choice | None:
    """Return a class index if the text is a number, else a label."""
    return text if text is None or not re.fullmatch("-?[0-9]+", text) else int(text)
