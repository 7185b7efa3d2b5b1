"""`make bench`: measures everything, prints each line and a row for each goal, and writes
`benchmarks/results/bench.json`.

`python -m benchmarks kernel service` runs only the named modules.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from . import peers, results
from .soak import memory, messages
from .speed import (
    captum,
    contention,
    counting,
    decoding,
    devices,
    fairness,
    fidelity,
    inference,
    kernel,
    mixed,
    models,
    ray_data,
    replicas,
    service,
    tolerance,
    transport,
)
from .support import measure
from .support.measure import Line
from .tables import summary

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        kernel,
        mixed,
        contention,
        service,
        transport,
        inference,
        counting,
        decoding,
        models,
        peers,
        captum,
        fairness,
        devices,
        ray_data,
        replicas,
        tolerance,
        fidelity,
        memory,
        messages,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(MODULES)}; none: all of them")
    parser.add_argument("--rounds", type=int, default=measure.ROUNDS, help="of most comparisons; default: %(default)s")
    args = parser.parse_args()
    measure.ROUNDS = args.rounds
    names = args.names or list(MODULES)
    if unknown := set(names) - set(MODULES):
        parser.error(f"there is no {sorted(unknown)}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    machine = results.machine()
    lines: list[Line] = []
    for name in names:
        with console.status(f"measuring: {name}"):
            try:
                run = results.Run.now(MODULES[name].run())
            except Exception as error:  # the others are measured nevertheless
                console.print_exception()
                lines.append(Line(name, None, "", "", met=False, detail=f"failed: {error}"))
                continue
        results.Results(machine, {name: run}).merge_into(results.NEWEST)
        lines += run.lines
    console.print(_lines_table(lines))
    if results.NEWEST.exists():
        runs = results.Results.read(results.NEWEST).runs.values()
        console.print(_summary_table([line for run in runs for line in run.lines]))
    console.print(f"{machine['cpus']} CPUs ({machine['cpu']}), torch {machine['torch']}; {results.NEWEST}")
    return 0 if all(line.met for line in lines) else 1


def _lines_table(lines: Sequence[Line]) -> Table:
    table = Table("measured", "figure", "goal", "met", "detail")
    for line in lines:
        met = "[green]yes[/]" if line.met else "[red]no[/]"
        table.add_row(line.what, line.figure_text, line.goal, met, line.detail)
    return table


def _summary_table(lines: Sequence[Line]) -> Table:
    table = Table("goal of", "figure", "goal", "")
    for row in summary(lines):
        color = "green" if all(line.met for line in row.lines) else "red"
        figures = " / ".join(line.figure_text for line in row.lines)
        table.add_row(row.name, figures, row.goal, f"[{color}]{row.verdict}[/]")
    return table


if __name__ == "__main__":
    sys.exit(main())
