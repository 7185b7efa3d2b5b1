"""Runs the simulation from 1 to 1,000 replicas, with a million batches in all, and checks its goals.

`python -m benchmarks.simulation --quick` takes a tenth of the batches.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

from ..support.measure import Line, report
from .system import System, ideal, simulate

# One client that uses all servers, at 0.8 of their capacity, and another run of a tenth of the batches, saturated.
SINGLE = (System(1, 20_000), System(3, 40_000), System(10, 80_000), System(100, 160_000), System(1000, 300_000))
# Several clients that do not know what the others send.
SEVERAL = (System(10, 100_000, n_clients=4), System(100, 150_000, n_clients=40), System(1000, 150_000, n_clients=400))
MEAN_LIFE_S, RESTART_S = 60.0, 5.0
THROUGHPUT_GOAL, P99_GOAL, LOAD = 0.95, 2.0, 0.8


def lines(share: float) -> Iterator[Line]:
    for base in (*SINGLE, *SEVERAL):
        system = replace(base, n_batches=max(1000, int(base.n_batches * share)))
        if system.n_clients == 1:
            yield _throughput(replace(system, n_batches=max(system.n_batches // 10, 100 * system.n_servers)))
        for mean_life_s in (0.0, MEAN_LIFE_S):
            yield _latency(replace(system, load=LOAD, mean_life_s=mean_life_s, restart_s=RESTART_S))


def _throughput(system: System) -> Line:
    outcome = simulate(system)
    return Line(
        what=f"{_name(system)}: throughput over the sum of the servers'",
        figure=outcome.utilization,
        unit="×",
        goal=f"≥ {THROUGHPUT_GOAL}, none lost or doubled",
        met=outcome.utilization >= THROUGHPUT_GOAL and not outcome.n_lost + outcome.n_doubled,
        detail=f"{system.n_batches} batches",
    )


def _latency(system: System) -> Line:
    outcome, best = simulate(system), ideal(system)
    ratio = outcome.p99_s / best.p99_s
    dying = f", servers die every {system.mean_life_s:g} s" if system.mean_life_s else ""
    return Line(
        what=f"{_name(system)}: p99 at {system.load} of capacity over the ideal queue's{dying}",
        figure=ratio,
        unit="×",
        goal=f"≤ {P99_GOAL:g}, none lost or doubled",
        met=ratio <= P99_GOAL and not outcome.n_lost + outcome.n_doubled,
        detail=(
            f"{system.n_batches} batches, {outcome.n_lost} lost, {outcome.n_doubled} doubled, {outcome.n_given_up} "
            f"given up; p50 {outcome.p50_s * 1e3:.0f} ms (ideal {best.p50_s * 1e3:.0f}), "
            f"p99 {outcome.p99_s * 1e3:.0f} ms"
        ),
    )


def _name(system: System) -> str:
    return f"{system.n_servers} servers, {system.n_clients} client{'s' if system.n_clients > 1 else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the batches")
    return report(lines(0.1 if parser.parse_args().quick else 1.0))


if __name__ == "__main__":
    sys.exit(main())
