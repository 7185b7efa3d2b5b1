"""The maps of the faster kernels compared with those of the exact one, on the demonstration's photographs.

`python -m benchmarks.speed.fidelity` prints the table of `docs/explanation/performance.md`; `--compile` adds
torch.compile.
"""

import argparse
import asyncio
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sidelight._cli.demo import photographs
from sidelight_server import (
    Answer,
    Engine,
    Files,
    Gradient,
    IntegratedGradients,
    PerExample,
    Request,
    Score,
    Settings,
    SmoothGrad,
)
from sidelight_server.methods import Method

from ..support.measure import Line
from ..support.nets import efficientnet_lite0

FOLDED = {"fold": True, "channels_last": True}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "fold": {"fold": True},
    "channels_last": {"channels_last": True},
    "fold+channels_last": FOLDED,
    "float16": {"precision": "float16"},
    "float16+fold+channels_last": {"precision": "float16"} | FOLDED,
    "mixed": {"precision": "mixed"},
    "mixed+fold+channels_last": {"precision": "mixed"} | FOLDED,
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16+fold+channels_last": {"precision": "bfloat16"} | FOLDED,
}
COMPILED = {"compile": {"compile": True}, "compile+fold+channels_last": {"compile": True} | FOLDED}
# The mean of many gradients also averages their rounding.
AVERAGES: dict[str, Method] = {"SmoothGrad-25": SmoothGrad(25), "IG-32": IntegratedGradients(32)}
AVERAGED = "bfloat16+fold+channels_last"
# Another order of summation in float32 must not move pixels. Whether bf16 is accurate enough, operators decide.
GOALS = {"fold+channels_last": 0.999, "mixed+fold+channels_last": 0.99, AVERAGED: 0.0}


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Comparison of one configuration's maps of the photographs with the exact ones."""

    name: str
    ranks: list[float]  # Spearman's rank correlation of each pair of maps
    apart: list[float]  # the largest difference of each pair, as a share of the exact map's maximum
    same_class: int  # photographs for which the predicted class is that of the exact kernel


def measure(configurations: dict[str, dict[str, Any]], method: Method, *, suffix: str = "") -> list[Fidelity]:
    """Explain every photograph with all kernels, each time the class that the exact kernel predicts."""
    files = Files(tuple(path.read_bytes() for path in photographs()))
    exact = _explained(files, PerExample(()), method)
    classes = PerExample(tuple(each.predicted for each in exact.explanations if each))
    explained = {name: _explained(files, classes, method, **each) for name, each in configurations.items()}
    return [_compared(name + suffix, exact, each) for name, each in explained.items()]


def _explained(files: Files, target: PerExample, method: Method, **options: Any) -> Answer:
    # The logit: for a photograph without an ImageNet class, the probability depends little on the class.
    request = Request(files, method=method, score=Score.LOGIT, **({"target": target} if target.choices else {}))
    with Engine([efficientnet_lite0()], Settings(device="cpu", max_chunk_rows=8, **options)) as engine:
        answer = asyncio.run(engine.attribute(request))
    assert not answer.failures
    return answer


def _compared(name: str, exact: Answer, other: Answer) -> Fidelity:
    pairs = list(zip(exact.maps.astype(np.float64), other.maps.astype(np.float64), strict=True))
    predictions = zip(exact.explanations, other.explanations, strict=True)
    return Fidelity(
        name,
        ranks=[float(spearmanr(a.ravel(), b.ravel()).statistic) for a, b in pairs],
        apart=[float(np.abs(a - b).max() / a.max()) for a, b in pairs],
        same_class=sum(a.predicted == b.predicted for a, b in predictions if a and b),
    )


def run() -> list[Line]:
    """Measure the configurations that `make bench` also times."""
    measured = measure({name: CONFIGURATIONS[name] for name in GOALS}, Gradient())
    return [
        Line(
            what=f"rank correlation with the exact maps, EfficientNet-Lite0, {each.name}",
            figure=statistics.mean(each.ranks),
            unit="",
            goal=f"≥ {GOALS[each.name]}" if GOALS[each.name] else "stated",
            met=statistics.mean(each.ranks) >= GOALS[each.name],
            detail=f"mean of {len(each.ranks)} photographs, {min(each.ranks):.4f} at the least; largest difference "
            f"{max(each.apart):.1e} of a map's maximum; {each.same_class} classes the same",
            row="rank correlation with the exact maps of 22 photographs, EfficientNet-Lite0: folded / mixed / bfloat16",
        )
        for each in measured
    ]


def main(*, compiled: bool) -> None:
    """Print the table."""
    measured = measure(CONFIGURATIONS | (COMPILED if compiled else {}), Gradient())
    for name, method in AVERAGES.items():
        measured += measure({AVERAGED: CONFIGURATIONS[AVERAGED]}, method, suffix=f", {name}")
    table = Table("configuration", "rank correlation", "least", "largest difference", "median", "same class")
    for each in measured:
        table.add_row(
            each.name,
            f"{statistics.mean(each.ranks):.5f}",
            f"{min(each.ranks):.5f}",
            f"{max(each.apart):.1e}",
            f"{statistics.median(each.apart):.1e}",
            f"{each.same_class} of {len(each.ranks)}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which takes minutes")
    main(compiled=parser.parse_args().compile)
