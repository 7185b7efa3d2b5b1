"""`make bench`: measures everything, prints one table, and writes it to `benchmarks/results/bench.json`.

`python -m benchmarks kernel service` measures what is named alone.
"""

import argparse
import dataclasses
import datetime as dt
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sidelight_server.compute.torch_device import cpu_quota

from . import peers
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
from .support.measure import Line

RESULTS = Path(__file__).parent / "results"
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
    names = parser.parse_args().names or list(MODULES)
    if unknown := set(names) - set(MODULES):
        parser.error(f"there is no {sorted(unknown)}")
    console, table = Console(), Table("measured", "figure", "goal", "met", "detail")
    lines: list[Line] = []
    for name in names:
        with console.status(f"measuring: {name}"):
            measured = MODULES[name].run()
        _write(name, measured)  # what was measured is kept, should the next one fail
        lines += measured
    for line in lines:
        met = "[green]yes[/]" if line.met else "[red]no[/]"
        table.add_row(line.what, f"{line.figure:.2f} {line.unit}", line.goal, met, line.detail)
    console.print(table)
    machine = _machine()
    console.print(f"{machine['cpus']} CPUs ({machine['cpu']}), torch {machine['torch']}; {RESULTS / 'bench.json'}")
    return 0 if all(line.met for line in lines) else 1


def _write(name: str, lines: list[Line]) -> None:
    """Write the lines of a module beside what other modules measured before, on this machine."""
    RESULTS.mkdir(exist_ok=True)
    file, machine = RESULTS / "bench.json", _machine()
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    modules = before.get("modules", {}) if before.get("machine") == machine else {}
    run = {
        "date": f"{dt.date.today()}",
        "commit": _commit(),
        "lines": [dataclasses.asdict(each) for each in lines],
    }
    results = {"machine": machine, "modules": modules | {name: run}}
    file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    return found.stdout.strip() or "an unknown commit"


def _machine() -> dict[str, object]:
    return {"cpu": _cpu(), "cpus": cpu_quota(), "torch": torch.__version__, "python": platform.python_version()}


def _cpu() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(": ")[2]
    except (OSError, IndexError):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
