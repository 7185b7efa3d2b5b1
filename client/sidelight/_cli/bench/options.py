"""Options of `sidelight bench`: which loads are measured, and for how long."""

import math
from typing import Annotated, Any, Literal, TypeVar

import typer

from .load import Arrivals
from .measurement import N_OUTSTANDING
from .statistics import PERCENTILES, STABLE_WINDOWS

CONCURRENCY = "1,2,4,8"

_Number = TypeVar("_Number", int, float)


def loads(
    *,
    mode: Annotated[Literal["unary", "stream"], typer.Option(help="Unary calls, or streams.")] = "unary",
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
    window: Annotated[
        int | None, typer.Option(help="With --mode stream: maximum number of unanswered images.", min=1)
    ] = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the loads as fields of `Plan`, and how requests are sent as fields of `Traffic`."""
    is_streamed, is_open = mode == "stream", rate is not None
    expect(concurrency is None or not is_open, "--concurrency", "only without --rate")
    expect(arrivals is None or is_open, "--arrivals", "only with --rate")
    expect(outstanding is None or (is_open and not is_streamed), "--outstanding", "only with --rate and --mode unary")
    expect(window is None or is_streamed, "--window", "only with --mode stream")
    concurrency = CONCURRENCY if concurrency is None else concurrency
    plan = {
        "callers": () if is_open else numbers(concurrency, int, "--concurrency"),
        "rates": () if rate is None else numbers(rate, float, "--rate"),
        "arrivals": arrivals or "constant",
        "n_outstanding": outstanding or N_OUTSTANDING,
    }
    return plan, {"is_streamed": is_streamed, "window": window}


def windows(
    *,
    interval: Annotated[float, typer.Option(help="Length of a window in seconds.")] = 5.0,
    max_windows: Annotated[int, typer.Option(help="Maximum number of windows per load.", min=STABLE_WINDOWS)] = 10,
    duration: Annotated[
        float | None, typer.Option(help="Measure each load for this many seconds, stable or not.")
    ] = None,
    stability: Annotated[
        float, typer.Option(help="Maximum difference in percent between three stable windows.")
    ] = 10.0,
    stable_percentile: Annotated[int, typer.Option(help="The latency percentile to compare between windows.")] = 95,
) -> dict[str, Any]:
    """Return how long each load is measured, as fields of `Plan`."""
    for option, number in (("--interval", interval), ("--duration", duration), ("--stability", stability)):
        expect(number is None or 0 < number < math.inf, option, f"a positive number, got {number}")
    expect(stable_percentile in PERCENTILES, "--stable-percentile", f"one of {PERCENTILES}, got {stable_percentile}")
    return {
        "interval_s": interval if duration is None else duration / STABLE_WINDOWS,
        "max_windows": max_windows if duration is None else STABLE_WINDOWS,
        "until_stable": duration is None,
        "stability": stability / 100,
        "stable_percentile": stable_percentile,
    }


def expect(is_valid: bool, option: str, expected: str) -> None:
    if not is_valid:
        raise typer.BadParameter(f"expected {expected}", param_hint=option)


def numbers(text: str, number: type[_Number], option: str) -> tuple[_Number, ...]:
    """Parse positive numbers that are separated by commas."""
    try:
        values = tuple(map(number, text.split(",")))
    except ValueError:
        values = ()
    noun = "whole numbers" if number is int else "numbers"
    is_valid = bool(values) and all(0 < each < math.inf for each in values)
    expect(is_valid, option, f"positive {noun} separated by commas, got {text!r}")
    return values
