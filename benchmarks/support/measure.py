"""Measurements on a shared machine: candidates alternate in one run, and medians are compared."""

import collections
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROUNDS = 7  # default of comparisons; `python -m benchmarks --rounds` changes it


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: a measurement, its figure, its goal, and whether the goal was met."""

    what: str
    figure: float | None  # None: it could not be measured, for the reason in `detail`
    unit: str
    goal: str
    met: bool
    detail: str
    row: str = ""  # of the summary, which it shares with the other lines of one goal

    @property
    def figure_text(self) -> str:
        if self.figure is None:
            return "not run"
        if self.unit:
            return f"{self.figure:.2f} {self.unit}"
        return f"{self.figure:.4f}" if isinstance(self.figure, float) else f"{self.figure}"


def report(lines: Iterable[Line]) -> int:
    """Print each line as it is measured. Returns the exit status: 1 if a goal was not met."""
    n_missed = 0
    for line in lines:
        met = "met" if line.met else "NOT MET"
        print(f"{line.what}: {line.figure_text} (goal {line.goal}, {met}); {line.detail}", flush=True)
        n_missed += not line.met
    return 1 if n_missed else 0


def in_turns(
    rivals: Mapping[str, Callable[[], object]], *, rounds: int | None = None, warm_up: bool = True
) -> dict[str, list[float]]:
    """Run the candidates alternately and return the seconds of each round, without the warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for round_ in range((rounds or ROUNDS) + warm_up):
        for name, rival in rivals.items():
            began = time.perf_counter()
            rival()
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Return the speedup: the median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def _drain(pipe: IO[str]) -> None:
    with contextlib.suppress(ValueError):  # closed meanwhile
        collections.deque(pipe, maxlen=0)


@contextlib.contextmanager
def server(model: str, *flags: str, address: str = "") -> Iterator[tuple[str, int]]:
    """Run a server in a process of its own; yield its address, a new one by default, and its process id."""
    root = Path(__file__).parent.parent.parent
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        address = address or f"unix:{folder}/socket"
        command = [sys.executable, "-m", "sidelight_server", "--model", model, "--listen", address, *flags]
        environment = os.environ | {"PYTHONPATH": str(root)}
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            try:
                for line in process.stderr or ():
                    if "event=serving" in line:
                        break
                else:
                    raise RuntimeError(f"the server did not start: {' '.join(command)}")
                # Read the pipe to its end: the server would block if it were full.
                threading.Thread(target=_drain, args=(process.stderr,), daemon=True).start()
                yield address, process.pid
            finally:
                process.terminate()
