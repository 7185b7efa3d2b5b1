"""The report: a progress line, tables at the end, and all results as JSON."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...results.attribution import Attribution
from ...results.server_info import ServerInfo
from .measurement import Bench, Measured, Plan, Step, Watch
from .statistics import PARTS, STABLE_WINDOWS, Figures
from .traffic import Traffic

BUSY_CPU = 0.9  # share of one core: because of the GIL, threads can use little more
LATENCIES = ("mean", "p50", "p90", "p95", "p99", "max")
LATE_SHARE = 0.01  # share of late requests above which the report warns that the schedule was not kept


@contextlib.contextmanager
def progress(console: Console, bench: Bench) -> Iterator[Watch]:
    """Yield a function that shows each window in a status line, on a terminal."""
    with console.status("measuring") as status:

        def watch(step: Step, windows: Sequence[Figures]) -> None:
            window = f"{step.name}: window {len(windows) + 1} of at most {bench.plan.max_windows}"
            status.update(escape(f"{window}{_so_far(windows[-1]) if windows else ''}"))

        yield watch


def report_bench(console: Console, bench: Bench, answer: Attribution) -> None:
    """Print the results and warnings about them."""
    console.print(escape(describe(bench.traffic, answer)), soft_wrap=True, highlight=False)
    if bench.results:
        console.print(_rates(bench.results), _parts(bench.results), sep="\n")
    for measured in bench.results:
        for remark in _remarks(bench.plan, measured):
            console.print(f"{measured.step.name}: {escape(remark)}", soft_wrap=True, highlight=False)
    if bench.interrupted:
        console.print("interrupted: the figures cover only the measurement so far", soft_wrap=True)


def describe(traffic: Traffic, answer: Attribution) -> str:
    """Describe the traffic and the model in one line."""
    way = "streamed" if traffic.is_streamed else "unary calls"
    sent = f"batches of {len(traffic.batches[0])}, {traffic.kind}, {way}"
    if (provenance := answer.provenance) is None:
        return sent
    ran = "+".join((provenance.precision, *provenance.kernel_options))
    return f"{provenance.model} on {provenance.device} in {ran}: {provenance.method}; {sent}"


def bench_facts(bench: Bench, server: ServerInfo, answer: Attribution, *, client_version: str) -> dict[str, Any]:
    """Return all results as values for JSON. Names end in their units."""
    traffic, provenance = bench.traffic, answer.provenance
    return {
        "client_version": client_version,
        "server_version": server.version,
        "settings": {name: each for name, each in dataclasses.asdict(bench.plan).items() if name != "connect_to"}
        | {
            "mode": "stream" if traffic.is_streamed else "unary",
            "window": traffic.window,
            "batch": len(traffic.batches[0]),
            "batches": len(traffic.batches),
            "images": traffic.kind,
            "map_dtype": traffic.explained.get("map_dtype", "float32"),
            "timeout_s": traffic.timeout_s,
        },
        "provenance": None if provenance is None else dataclasses.asdict(provenance),
        "transport": answer.transport,
        "whole": bench.is_whole,
        "interrupted": bench.interrupted,
        "loads": [dataclasses.asdict(each) for each in bench.results],
    }


def _so_far(figures: Figures) -> str:
    failed = f", {figures.failed} failed" if figures.failed else ""
    p95 = "" if figures.latency is None else f", p95 {_ms(figures.latency.p95_s)} ms"
    return f"; the last: {figures.requests_per_s:.1f} requests/s{p95}{failed}"


def _rates(results: Sequence[Measured]) -> Table:
    # Methods of one row have equal rates of rows and images: omit the column to save width.
    has_rows = any(each.figures.rows_per_s != each.figures.images_per_s for each in results)
    headers = ["requests/s", "images/s", *(["rows/s"] if has_rows else []), *LATENCIES, "failed"]
    table = _table("latency in ms", headers)
    for measured in results:
        figures, latency = measured.figures, measured.figures.latency
        rates = [figures.requests_per_s, figures.images_per_s, *([figures.rows_per_s] if has_rows else [])]
        spans = [""] * len(LATENCIES) if latency is None else map(_ms, dataclasses.astuple(latency))
        table.add_row(measured.name, *(f"{each:.1f}" for each in rates), *spans, str(figures.failed))
    return table


def _parts(results: Sequence[Measured]) -> Table:
    is_open = any(each.figures.lateness for each in results)
    parts = PARTS if is_open else PARTS[1:]
    table = _table("where the mean latency went, in ms", parts)
    for measured in results:
        if measured.figures.split is not None:
            spans = dataclasses.astuple(measured.figures.split)[-len(parts) :]
            table.add_row(measured.name, *map(_ms, spans))
    return table


def _table(title: str, headers: Sequence[str]) -> Table:
    table = Table("load", box=None, padding=(0, 1, 0, 0), header_style="bold", title=title, title_justify="left")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    table.columns[0].no_wrap = True
    return table


def _remarks(plan: Plan, measured: Measured) -> Iterator[str]:
    figures = measured.figures
    if not measured.stable:
        last = f"the last {STABLE_WINDOWS} of {len(measured.windows)} windows"
        share, percentile = f"{100 * plan.stability:g} %", f"p{plan.stable_percentile}"
        yield f"* not stable: {last} do not agree within {share} in requests/s and {percentile}"
    for name, fault in figures.failures.items():
        yield f"{fault.count} × {name}, the first: {fault.message}"
    longest_s = 0.0 if figures.latency is None else figures.latency.max_s
    if measured.oldest_unanswered_s > longest_s:
        yield (
            f"{measured.unanswered} requests were unanswered at the end, the oldest for "
            f"{measured.oldest_unanswered_s:.1f} s: longer than any answered request took"
        )
    if figures.lateness is not None and figures.lateness.late > LATE_SHARE * figures.lateness.sent:
        late = figures.lateness
        yield (
            f"the schedule was not kept: {late.late} of {late.sent} requests were sent over 10 ms late, by "
            f"{late.max_s:.2f} s at most, because --outstanding or the stream's window was reached, or because this "
            "process was too slow; latency counts from when they were due"
        )
    if figures.client_cpu > BUSY_CPU:
        yield f"this process used {figures.client_cpu:.2f} CPU cores: it may have limited the rate"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"
