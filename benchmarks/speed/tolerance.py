"""Integrated gradients with a tolerance: the number of rows, and the distance to the integral.

`python -m benchmarks.speed.tolerance --photographs 22` uses all of them. The reference of 1,025
nodes takes most of the time.
"""

import argparse
import statistics
import sys

import numpy as np
import sidelight
from sidelight._cli.demo import photographs

from ..support.measure import Line, report, server

TOLERANCE = 0.05
REFERENCE_NODES = 1025
ROWS_GOAL = 150
PHOTOGRAPHS = 4


def run(n_photographs: int = PHOTOGRAPHS) -> list[Line]:
    """Compare maps of the demonstration's classifier with those of 1,025 nodes, without channel reduction."""
    paths = photographs()[:n_photographs]
    to_tolerance = sidelight.IntegratedGradients(tolerance=TOLERANCE, max_rows=300)
    reference = sidelight.IntegratedGradients(steps=REFERENCE_NODES, rule="trapezoid")
    rows, away, completeness = [], [], []
    with (
        server("python:benchmarks.support.nets:efficientnet_lite0") as (address, _),
        sidelight.connect(address) as client,
    ):
        for path in paths:
            ours, exact = (
                client.attribute(path, method=method, channels="none", timeout=600)
                for method in (to_tolerance, reference)
            )
            (convergence,) = ours.convergence
            assert convergence is not None
            rows.append(convergence.rows)
            away.append(float(np.linalg.norm(ours.maps - exact.maps) / np.linalg.norm(exact.maps)))
            completeness.append(convergence.relative_completeness_error or 0.0)
            print(f"{path.name:24} {rows[-1]:4} rows, error {convergence.error:.3f}, distance {away[-1]:.3f}")
    return [
        Line(
            what=f"rows of integrated gradients to a tolerance of {TOLERANCE}, mean of {len(paths)} photographs",
            figure=statistics.mean(rows),
            unit="rows",
            goal=f"≤ {ROWS_GOAL}",
            met=statistics.mean(rows) <= ROWS_GOAL,
            detail=f"{min(rows)} to {max(rows)}; relative completeness error {max(completeness):.3f} at most",
        ),
        Line(
            what=f"their distance to the integral of {REFERENCE_NODES:,} nodes, relative L2, mean",
            figure=statistics.mean(away),
            unit="",
            goal=f"≤ {TOLERANCE}",
            met=statistics.mean(away) <= TOLERANCE,
            detail=f"{min(away):.3f} to {max(away):.3f}",
        ),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=PHOTOGRAPHS)
    sys.exit(report(run(parser.parse_args().photographs)))
