"""The command `sidelight bench`: its options, and what is wrong with them."""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer
from rich.console import Console

from ... import __version__
from ..._core import TIMEOUT_S
from ..._inputs.enums import MapDtype, Score
from ..._inputs.targets import Choice
from ...exceptions import InvalidArgument, SidelightError
from ...methods.method import Method
from ...methods.parsing import parse_method
from ...results.server_info import ModelInfo
from ..options import DEFAULT_ADDRESS, Reach
from .arrivals import Arrivals
from .measurement import N_OUTSTANDING, Bench, Plan
from .plot import check_plot, plot
from .report import bench_facts, progress, question, report_bench
from .statistics import PERCENTILES, STABLE_WINDOWS
from .traffic import Sent, Shape, Traffic, batches_of_files, random_batches

CONCURRENCY = "1,2,4,8"
INTERRUPTED = 130  # 128 + SIGINT, as a shell has it

_Number = TypeVar("_Number", int, float)


def bench(
    images: Annotated[list[Path] | None, typer.Argument(help="Picture files; without them noise is sent.")] = None,
    *,
    address: Annotated[
        str, typer.Option(help='The server: "host:port" or "unix:/path".', envvar="SIDELIGHT_ADDRESS")
    ] = DEFAULT_ADDRESS,
    mode: Annotated[Literal["unary", "stream"], typer.Option(help="A call for each batch, or streams.")] = "unary",
    batch: Annotated[int, typer.Option(help="Images of one request.", min=1)] = 1,
    concurrency: Annotated[
        str | None, typer.Option(help=f"A closed loop of so many callers, or streams; unset: {CONCURRENCY}.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Instead an open loop: requests a second, one number or several.")
    ] = None,
    arrivals: Annotated[
        Arrivals | None, typer.Option(help="With --rate: evenly (the default), or as independent callers come.")
    ] = None,
    outstanding: Annotated[int | None, typer.Option(help="With --rate: unanswered calls at most.", min=1)] = None,
    interval: Annotated[float, typer.Option(help="Seconds of a window.")] = 5.0,
    max_windows: Annotated[int, typer.Option(help="Windows of a load at most.", min=STABLE_WINDOWS)] = 10,
    duration: Annotated[float | None, typer.Option(help="Instead measure each load for so many seconds.")] = None,
    stability: Annotated[float, typer.Option(help="Per cent by which three windows that agree may differ.")] = 10.0,
    stable_percentile: Annotated[int, typer.Option(help="The percentile of latency that is to agree.")] = 95,
    window: Annotated[int | None, typer.Option(help="Of a stream: its unanswered images.", min=1)] = None,
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Send pictures as pixels of the model's input size.")
    ] = False,
    shape: Annotated[str | None, typer.Option(help="Send noise of this shape, as C,H,W floats.")] = None,
    model: Annotated[str | None, typer.Option(help="The model's name; unset: the server's default.")] = None,
    target: Annotated[str | None, typer.Option(help="A class index or label; unset: the predicted class.")] = None,
    method: Annotated[
        str, typer.Option(help="How, as in `sidelight attribute`: 'smoothgrad(samples=8)'.")
    ] = "gradient",
    score: Annotated[Score, typer.Option(help="The number whose gradient is taken.")] = "probability",
    map_dtype: Annotated[MapDtype, typer.Option(help="How the maps travel; the shorter ones are rounded.")] = "float32",
    timeout: Annotated[float, typer.Option(help="Seconds that one request may take.")] = TIMEOUT_S,
    shared_memory: Annotated[
        bool, typer.Option("--shared-memory", help="Send arrays through memory that the server shares.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the noise and of random arrivals.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="A file for all figures.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="A file for a picture, as figures.png.")] = None,
    reach: Reach,
) -> None:
    """Measure a server under load: rate, latency, and where the time goes.

    Each load is measured in windows until three of them agree. Ends with 1 where they do not, or nothing is answered.
    """
    is_streamed, is_open = mode == "stream", rate is not None
    _expect(concurrency is None or not is_open, "--concurrency", "it without --rate")
    _expect(arrivals is None or is_open, "--arrivals", "--rate beside it")
    _expect(outstanding is None or (is_open and not is_streamed), "--outstanding", "--rate beside it, and unary calls")
    _expect(window is None or is_streamed, "--window", "--mode stream beside it")
    _expect(shape is None or not (images or pixels), "--shape", "it without pictures")
    _expect(not pixels or bool(images), "--pixels", "pictures beside it")
    for option, number in (("--interval", interval), ("--duration", duration), ("--stability", stability)):
        _expect(number is None or 0 < number < math.inf, option, f"a positive number, got {number}")
    _expect(stable_percentile in PERCENTILES, "--stable-percentile", f"one of {PERCENTILES}, got {stable_percentile}")
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        _expect(
            file is None or file.absolute().parent.is_dir(), option, f"a file in a folder that is there, got {file}"
        )
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
        reach=reach,
    )
    how, what, size = _method(method), _target(target), _shape(shape)
    with plan.connect() as client:
        server = client.info()
        info = client.model(model)
        traffic = Traffic(
            _batches(images or [], batch, info, pixels=pixels, shape=size, seed=seed),
            model,
            target=what,
            method=how,
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
    """Return positive numbers that stand between commas."""
    try:
        numbers = tuple(map(number, text.split(",")))
    except ValueError:
        numbers = ()
    noun = "whole numbers" if number is int else "numbers"
    is_right = bool(numbers) and all(0 < each < math.inf for each in numbers)
    _expect(is_right, option, f"positive {noun} with commas between them, got {text!r}")
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
    """Return a class index where the text is a number, else a label."""
    return text if text is None or not re.fullmatch("-?[0-9]+", text) else int(text)
