"""The results of benchmarks as JSON: the newest run of each, with its date and its commit."""

import dataclasses
import datetime as dt
import json
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from sidelight_server.compute.torch_device import cpu_quota

from .support.measure import Line

RESULTS = Path(__file__).parent / "results"
NEWEST = RESULTS / "bench.json"


@dataclass(frozen=True, slots=True)
class Run:
    """The lines of one benchmark."""

    date: str
    commit: str
    lines: list[Line]

    @classmethod
    def now(cls, lines: list[Line]) -> Self:
        """Return the run that has just ended."""
        return cls(f"{dt.date.today()}", _commit(), lines)


@dataclass(frozen=True, slots=True)
class Results:
    """The results of one machine."""

    machine: dict[str, object]
    runs: dict[str, Run] = field(default_factory=dict)  # by the benchmark's name

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return the results in a file."""
        found = json.loads(file.read_text(encoding="utf-8"))
        runs = {
            name: Run(run["date"], run["commit"], [Line(**each) for each in run["lines"]])
            for name, run in found["runs"].items()
        }
        return cls(found["machine"], runs)

    def merge_into(self, file: Path) -> None:
        """Write these runs into a file, beside the runs of other benchmarks on the same machine."""
        before = Results.read(file) if file.exists() else self
        kept = before.runs if before.machine == self.machine else {}
        words = dataclasses.asdict(dataclasses.replace(self, runs=kept | self.runs))
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(words, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def machine() -> dict[str, object]:
    """Return the properties that figures depend on: the CPUs, and the versions of torch and Python."""
    return {"cpu": _cpu(), "cpus": cpu_quota(), "torch": torch.__version__, "python": platform.python_version()}


def _commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return found.stdout.strip() or "an unknown commit"


def _cpu() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].partition(": ")[2]
    except (OSError, IndexError):
        return platform.processor()
