"""Triton's client compared with ours: each streams the same batches, to a model that computes almost nothing.

tritonclient runs in an environment and a process of its own (`make inference`). `python -m benchmarks inference` runs
only this.
"""

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sidelight

from ..support.measure import Line, in_turns, ratio, server
from .transport import CASES, CHUNK_ROWS, Case

ROOT = Path(__file__).parent.parent.parent
PYTHON = ROOT / ".venv-inference" / "bin" / "python"
GOAL = 0.9
GOAL_FROM_BYTES = 150_000
SHARED_GOAL = 1.0

Round = Callable[..., None]


def run() -> list[Line]:
    """Measure each size on both streams, and the largest in Triton's shared memory."""
    if not PYTHON.exists():
        print("no tritonclient: make inference makes its environment", file=sys.stderr)
        return []
    flags = ("--threads", "1", "--max-chunk-rows", str(CHUNK_ROWS), "--shared-memory", "/dev/shm")
    with (
        server("python:benchmarks.speed.transport:costless", *flags, address="127.0.0.1:50871") as (address, _),
        _driver(address) as triton,
        sidelight.connect(address) as client,
    ):
        return [*(_streams(case, client, triton) for case in CASES), _shared(CASES[-1], triton)]


def _streams(case: Case, client: sidelight.Client, triton: Round) -> Line:
    images = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32)

    def ours() -> None:
        batches = (images for _ in range(case.n))
        answers = client.stream(batches, channels="none", window=case.window * len(images))
        assert sum(answer.maps.shape == images.shape for answer in answers) == case.n

    seconds = in_turns({"ours": ours, "triton": lambda: triton(case, shared=False)})
    share = ratio(seconds["ours"], seconds["triton"])
    rates = {name: case.n / statistics.median(each) for name, each in seconds.items()}
    has_goal = case.n_bytes >= GOAL_FROM_BYTES
    return Line(
        what=f"tritonclient's stream over our client's, batches of {case.name}, a model that costs nothing",
        figure=share,
        unit="×",
        goal=f"≥ {GOAL}" if has_goal else "none",
        met=share >= GOAL or not has_goal,
        detail=f"{rates['triton']:.0f} against {rates['ours']:.0f} batches/s",
    )


def _shared(case: Case, triton: Round) -> Line:
    seconds = in_turns({"inline": lambda: triton(case, shared=False), "shared": lambda: triton(case, shared=True)})
    faster = ratio(seconds["inline"], seconds["shared"])
    return Line(
        what=f"tritonclient's shared memory over its messages, batches of {case.name}",
        figure=faster,
        unit="×",
        goal=f"≥ {SHARED_GOAL:g}",
        met=faster >= SHARED_GOAL,
        detail=f"{case.n / statistics.median(seconds['shared']):.0f} batches/s; the caller's copies are counted",
    )


@contextlib.contextmanager
def _driver(address: str) -> Iterator[Round]:
    """Start the driver; yield a function that has it run a round."""
    command = [PYTHON, Path(__file__).parent / "triton_stream.py", address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout

        def run(case: Case, *, shared: bool) -> None:
            order = {"shape": case.shape, "n": case.n, "window": case.window, "shared": shared}
            print(json.dumps(order), file=process.stdin, flush=True)
            if not process.stdout.readline():
                raise RuntimeError("tritonclient's driver has ended; its error is above")

        try:
            yield run
        finally:
            process.terminate()
