"""How long OpenMP's threads should spin: the kernel alone, and with one and three other busy processes.

OpenMP reads its variables once, so each policy has a process of its own. They run alternately, so that all are
disturbed alike. A neighbor is a torch process that computes without a pause, with OpenMP's default policy.
"""

import contextlib
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from sidelight_server.app.openmp import SPIN_COUNT, VARIABLES

from ..support.measure import Line, ratio

POLICIES: dict[str, dict[str, str]] = {
    "OpenMP's own": {"GOMP_SPINCOUNT": "300000"},  # set, because `benchmarks` sets another value if there is none
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "100 spins": {"GOMP_SPINCOUNT": "100"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
}
OURS = f"{SPIN_COUNT:,} spins"
NETWORKS = ("ResNet-18", "a small CNN")
NEIGHBORS = (0, 1, 3)
ROUNDS = 9
TURN_S = 1.0  # of one policy, until its last chunk ends: with OpenMP's default one may take ten seconds
ROWS = 8
ALONE_GOAL = 0.97
BESIDE_ONE_GOAL = 1.5


def run(rounds: int = ROUNDS) -> list[Line]:
    """Measure every policy with every network and number of neighbors; compare ours with OpenMP's default."""
    return [line for network in NETWORKS for n in NEIGHBORS for line in _compared(network, n, rounds)]


def _compared(network: str, n_neighbors: int, rounds: int) -> list[Line]:
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(_process("work", network, POLICIES[name])) for name in POLICIES}
        for _ in range(n_neighbors):
            stack.enter_context(_process("disturb", network, POLICIES["OpenMP's own"]))
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                seconds[name].append(_turn(worker))
    own = seconds["OpenMP's own"]
    where = {0: "alone", 1: "beside one busy process"}.get(n_neighbors, f"beside {n_neighbors} busy processes")
    goal = {0: ALONE_GOAL, 1: BESIDE_ONE_GOAL}.get(n_neighbors) if network == "ResNet-18" else None
    return [
        Line(
            what=f"kernel of {network}, {where}: {name} over OpenMP's own policy",
            figure=(times := ratio(own, taken)),
            unit="×",
            goal=f"≥ {goal:g}" if goal and name == OURS else "no goal",
            met=not goal or name != OURS or times >= goal,
            detail=f"{_rate(taken):.1f} images/s, {_rate(own):.1f} with OpenMP's own",
        )
        for name, taken in seconds.items()
        if taken is not own
    ]


def _rate(seconds: list[float]) -> float:
    return ROWS / statistics.median(seconds)


@contextlib.contextmanager
def _process(role: str, network: str, policy: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """Run this module as a process under a policy, and wait until it is warm."""
    command = [sys.executable, "-c", f"from benchmarks.speed import contention; contention.{role}({network!r})"]
    environment = {name: each for name, each in os.environ.items() if name not in VARIABLES} | policy
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def _turn(worker: "subprocess.Popen[str]") -> float:
    """Run a worker for `TURN_S`, and return the seconds of a chunk."""
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def work(network: str) -> None:
    """For each line of standard input, run chunks for a moment and print the seconds per chunk."""
    chunk = _chunk(network)
    for _ in range(3):
        chunk()
    print("ready", flush=True)
    for _ in sys.stdin:
        n, began = 0, time.perf_counter()
        while time.perf_counter() - began < TURN_S:
            chunk()
            n += 1
        print((time.perf_counter() - began) / n, flush=True)


def disturb(network: str) -> None:
    """Compute without a pause, for as long as the benchmark lives."""
    parent = os.getppid()
    chunk = _chunk(network)
    chunk()
    print("ready", flush=True)
    while os.getppid() == parent:
        chunk()


def _chunk(network: str) -> Callable[[], object]:
    import torch
    from sidelight_server.compute.kernel import Kernel
    from sidelight_server.compute.torch_device import cpu_quota
    from sidelight_server.domain import PREDICTED, Score
    from torch import nn

    from ..support.nets import SIZE, resnet18

    torch.set_num_threads(cpu_quota())
    if network == "ResNet-18":
        module, size = resnet18().module, SIZE
    else:
        module, size = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
        ), 32  # fmt: skip
    images = torch.rand(ROWS, 3, size, size, generator=torch.Generator().manual_seed(0))
    kernel = Kernel(module, device=torch.device("cpu"))
    return functools.partial(kernel.run, images, [PREDICTED] * ROWS, [Score.PROBABILITY] * ROWS)
