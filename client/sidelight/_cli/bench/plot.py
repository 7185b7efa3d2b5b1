"""Plots: throughput over latency for several loads, or the latencies of one, and the time in each stage."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...exceptions import InvalidArgument
from .measurement import Measured
from .statistics import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES, DOTS_PER_INCH = (11.5, 4.6), 130
# The color-blind safe palette of Okabe and Ito, 2008.
COLORS = {"p50": "#0072B2", "p95": "#E69F00", "p99": "#D55E00"}
WIDE = 20  # ratio of the medians above which the axis is logarithmic, and the stages are shares of the latency
MIN_BARS = 3  # a single bar would fill the axes
PART_COLORS = ("#999999", "#56B4E9", "#F0E442", "#E69F00", "#0072B2", "#CC79A7")


def check_plot(path: Path) -> None:
    """Raise `InvalidArgument` if matplotlib is missing or cannot write this kind of file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidArgument("--plot: needs matplotlib: pip install 'sidelight[plot]'") from None
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise InvalidArgument(f"--plot: got {path.name}, expected a name that ends in one of .{', .'.join(known)}")


def plot(path: Path, results: Sequence[Measured], *, title: str) -> None:
    """Draw the results into a file. Its suffix selects the format."""
    # Without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    shown = [each for each in results if each.figures.requests]
    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    if len(shown) == 1:
        _draw_latencies(left, shown[0])
    elif shown:
        _draw_sweep(left, shown)
    if shown:
        _draw_parts(right, shown)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, wrap=True)
    figure.savefig(path)


def _draw_sweep(axes: "Axes", shown: Sequence[Measured]) -> None:
    rates = [each.figures.images_per_s for each in shown]
    for percentile, color in COLORS.items():
        spans = [_percentile_ms(each, percentile) for each in shown]
        axes.plot(spans, rates, marker="o", color=color, label=percentile)
    paper = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for each, rate in zip(shown, rates, strict=True):
        point = _percentile_ms(each, "p99"), rate
        axes.annotate(each.name, point, (7, -13), textcoords="offset points", fontsize=9, bbox=paper)
    note = "" if all(each.stable for each in shown) else " (* not stable)"
    axes.set(xlabel="latency (ms)", ylabel="throughput (images/s)", title="throughput over latency" + note)
    left, right = axes.get_xlim()
    if _is_wide(shown):
        _scale_by_factors(axes)
        axes.set_xlim(right=4 * right)  # room for the names
    else:
        axes.set_xlim(0, right + 0.2 * (right - left))
    axes.set_ylim(0, 1.1 * max(rates))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")


def _draw_latencies(axes: "Axes", measured: Measured) -> None:
    counts = np.array(measured.histogram.counts)
    edges_ms = np.array(measured.histogram.edges_s) * 1e3
    axes.stairs(100 * counts / counts.sum(), edges_ms, fill=True, color="#BFD7EA")
    for percentile, color in COLORS.items():
        span = _percentile_ms(measured, percentile)
        axes.axvline(span, color=color, label=f"{percentile}: {span:.3g} ms")
    _scale_by_factors(axes)
    note = "" if measured.stable else " (not stable)"
    axes.set(xlabel="latency (ms)", ylabel="share of answers (%)", title="latencies" + note)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _draw_parts(axes: "Axes", shown: Sequence[Measured]) -> None:
    parts = np.array([dataclasses.astuple(each.figures.split) for each in shown if each.figures.split]) * 1e3
    parts = parts.clip(0)  # [loads, parts]
    if is_wide := _is_wide(shown):  # next to a load of seconds, one of milliseconds would be invisible
        parts *= 100 / parts.sum(axis=1, keepdims=True)
    left = np.zeros(len(shown))
    for part, color, spans in zip(PARTS, PART_COLORS, parts.T, strict=True):
        if part != "late" or spans.any():
            axes.barh([each.name for each in shown], spans, left=left, color=color, label=part, height=0.6)
            left += spans
    room = max(0, MIN_BARS - len(shown)) / 2
    axes.set_ylim(len(shown) - 0.5 + room, -0.5 - room)  # the first on top
    unit = "share of the mean latency (%)" if is_wide else "mean latency (ms)"
    axes.set(xlabel=unit, title="where the time goes")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _scale_by_factors(axes: "Axes") -> None:
    """Make the latencies' axis logarithmic, with plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda span, _: f"{span:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _is_wide(shown: Sequence[Measured]) -> bool:
    medians = [_percentile_ms(each, "p50") for each in shown]
    return max(medians) > WIDE * min(medians)


def _percentile_ms(measured: Measured, percentile: str) -> float:
    return float(getattr(measured.figures.latency, f"{percentile}_s")) * 1e3
