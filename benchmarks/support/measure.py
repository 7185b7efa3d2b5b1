"""How things are measured: rivals take turns in one run, and ratios are of medians. The machine is shared and noisy."""

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

ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: what was measured, the ratio or figure that counts, and what it should be."""

    what: str
    figure: float
    unit: str
    goal: str
    met: bool
    detail: str


def report(lines: Iterable[Line]) -> int:
    """Print each line as it comes. Returns what a process should exit with: 1 if a goal was not met."""
    n_missed = 0
    for line in lines:
        met = "met" if line.met else "NOT MET"
        print(f"{line.what}: {line.figure:.2f} {line.unit} (goal {line.goal}, {met}); {line.detail}", flush=True)
        n_missed += not line.met
    return 1 if n_missed else 0


def in_turns(
    rivals: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS, warm_up: bool = True
) -> dict[str, list[float]]:
    """Run the rivals in turn and return the seconds that each round took. A round to warm up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for round_ in range(rounds + warm_up):
        for name, rival in rivals.items():
            began = time.perf_counter()
            rival()
            if round_ >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Return how many times as fast: the median over the rounds of each round's own ratio."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def _drain(pipe: IO[str]) -> None:
    with contextlib.suppress(ValueError):  # closed meanwhile
        collections.deque(pipe, maxlen=0)


@contextlib.contextmanager
def server(model: str, *flags: str, address: str = "") -> Iterator[tuple[str, int]]:
    """Run a server as a process of its own; give its address, a fresh one if none is named, and process id."""
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
                # The pipe is read to its end: a server whose log nobody reads would stop once it is full.
                threading.Thread(target=_drain, args=(process.stderr,), daemon=True).start()
                yield address, process.pid
            finally:
                process.terminate()
