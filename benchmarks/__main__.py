"""`make bench`: measures everything, prints one table, and writes it to `benchmarks/results/bench.json`."""

import dataclasses
import json
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sidelight_server.device import cpu_quota

from . import captum, fairness, kernel, memory, peers, service, tolerance

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    console, table = Console(), Table("measured", "figure", "goal", "met", "detail")
    lines = []
    for module in (kernel, service, peers, captum, fairness, tolerance, memory):
        name = module.__name__.rpartition(".")[2]
        with console.status(f"measuring: {name}"):
            lines += module.run()
    for line in lines:
        met = "[green]yes[/]" if line.met else "[red]no[/]"
        table.add_row(line.what, f"{line.figure:.2f} {line.unit}", line.goal, met, line.detail)
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    machine = {"cpu": _cpu(), "cpus": cpu_quota(), "torch": torch.__version__, "python": platform.python_version()}
    results = {"machine": machine, "lines": [dataclasses.asdict(line) for line in lines]}
    (RESULTS / "bench.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"{machine['cpus']} CPUs ({machine['cpu']}), torch {machine['torch']}; {RESULTS / 'bench.json'}")
    return 0 if all(line.met for line in lines) else 1


def _cpu() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(": ")[2]
    except (OSError, IndexError):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
