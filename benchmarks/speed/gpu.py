"""The kernel on a GPU: its maps compared with the CPU's, and its speed, for `docs/explanation/performance.md`.

`python -m benchmarks.speed.gpu` prints two tables and writes `benchmarks/results/gpu.json`. It exits with 1 if a map
differs or a goal is missed, and with 2 without a GPU. `--rehearse` runs the same code on the CPU with a small network,
to check that it works; its figures mean nothing.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sidelight
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sidelight_server import ModelSpec
from sidelight_server.compute.kernel import Kernel
from sidelight_server.compute.max_abs import largest_absolute
from sidelight_server.compute.staging import HostCopy, Staging
from sidelight_server.domain import PREDICTED, Score
from sidelight_server.models.model import Model
from torch import Tensor

from ..support import nets
from ..support.measure import server

RESULTS = Path(__file__).parent.parent / "results" / "gpu.json"
FASTER = {"fold": True, "channels_last": True}
STREAM_GOAL, SEED_GOAL = 0.9, 3.0
# Goals of the mean rank correlation with the CPU's exact maps. TF32 has 10 bits of mantissa, bf16 has 7.
FIDELITY = {"float32": 0.999, "tf32": 0.95, "bfloat16": 0.9}
ROUNDS, CHUNKS, BATCHES = 5, 12, 60
CHECKED = 8


@dataclass(frozen=True, slots=True)
class Precision:
    """One precision to measure: its name, the model's factory, and the server's options."""

    name: str
    factory: str
    option: dict[str, Any]

    @property
    def flags(self) -> list[str]:
        """The server's flags."""
        return ["--precision", self.option["precision"]] if self.option else []


PRECISIONS = (
    Precision("float32", "resnet50", {}),
    Precision("tf32", "resnet50_tf32", {}),
    Precision("bfloat16", "resnet50", {"precision": "bfloat16"}),
)


@dataclass(frozen=True, slots=True)
class Rates:
    """Images per second in one precision, and ratios of them."""

    precision: str
    seed: float  # forward, and backward to every weight, as the original does
    ours: float  # the gradient at the input alone
    faster: float  # and folded, channels-last
    graphs: float  # and as a CUDA graph
    replay: float  # only the graph: neither head nor copies
    stream: float  # of a server in a process of its own
    copies_hidden: float  # share of the copies' time that overlaps with computation

    @property
    def of_replay(self) -> float:
        """The stream's rate as a share of the graph's own."""
        return self.stream / self.replay

    @property
    def over_seed(self) -> float:
        """The speedup of the kernel over the original."""
        return max(self.ours, self.faster, self.graphs) / self.seed


class Bench:
    """One run: the device, the model at its size, and the rows of a chunk."""

    def __init__(self, device: torch.device, *, n_rows: int, is_rehearsal: bool) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # the GPU on which Triton launches kernels
        self.n_rows = n_rows
        self.is_rehearsal = is_rehearsal

    def spec(self, precision: Precision) -> ModelSpec:
        """Return the model. TF32 is on or off for the whole process from now on."""
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        return nets.resnet18_small() if self.is_rehearsal else getattr(nets, precision.factory)()

    def fidelity(self, precision: Precision) -> tuple[float, float]:
        """Return the mean rank correlation with the CPU's exact maps, and the largest relative difference."""
        spec = self.spec(precision)
        x = torch.rand(CHECKED, *spec.input_size, generator=torch.Generator().manual_seed(1))
        exact = _maps(Kernel(spec.module, device=torch.device("cpu")), x)
        ours = _maps(self.model(spec, precision, **FASTER, **self.recorded()).kernel, x.to(self.device)).cpu()
        ranks = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(exact, ours, strict=True)]
        return float(np.mean(ranks)), float((ours - exact).abs().max() / exact.abs().max())

    def rates(self, precision: Precision) -> Rates:
        """Measure everything in one precision."""
        spec = self.spec(precision)
        pixels = np.random.default_rng(0).integers(0, 256, (self.n_rows, *spec.input_size[1:], 3), np.uint8)
        plain, faster = self.model(spec, precision), self.model(spec, precision, **FASTER)
        recorded = self.model(spec, precision, **FASTER, **self.recorded())
        x = plain.inputs(torch.from_numpy(pixels).to(self.device))
        ways = {each: self.rate(lambda model=each: _maps(model.kernel, x)) for each in (plain, faster, recorded)}
        seconds = self.n_rows / ways[recorded]
        return Rates(
            precision=precision.name,
            seed=self.rate(self.seed(spec, precision, x)),
            ours=ways[plain],
            faster=ways[faster],
            graphs=ways[recorded],
            replay=self.rate(self.replayed(recorded, x)),
            stream=self.streamed(precision, pixels),
            copies_hidden=self.hidden(recorded, pixels, computed_s=seconds),
        )

    def model(self, spec: ModelSpec, precision: Precision, **options: bool) -> Model:
        """Return the model with options, after its trial."""
        chosen = spec.replace(**precision.option, **options)
        return Model(chosen.completed({}), device=self.device)

    def recorded(self) -> dict[str, bool]:
        """Return the option for CUDA graphs, which a CPU does not have."""
        return {} if self.is_rehearsal else {"cuda_graphs": True}

    def seed(self, spec: ModelSpec, precision: Precision, x: Tensor) -> Callable[[], Tensor]:
        """Return the original's computation: a backward pass that also computes the gradients of all weights."""
        module = (
            copy.deepcopy(spec.module)
            .to(self.device, getattr(torch, precision.option.get("precision", "float32")))
            .eval()
        )

        def explain() -> Tensor:
            leaf = x.to(next(module.parameters()).dtype).requires_grad_()
            module.zero_grad()
            probabilities = module(leaf).softmax(dim=1)
            probabilities.amax(dim=1).sum().backward()
            return leaf.grad.abs().amax(dim=1)

        return explain

    def replayed(self, model: Model, x: Tensor) -> Callable[[], object]:
        """Return only the forward and the backward pass."""
        if self.is_rehearsal:
            return lambda: _maps(model.kernel, x)
        recording = model.kernel._recorded.of(x)

        def replay() -> None:
            recording._replay_forward()
            recording._replay_backward()

        return replay

    def rate(self, work: Callable[[], object]) -> float:
        """Return the images per second of work on one chunk: the median of the rounds."""
        work()
        seconds = [self.seconds(lambda: [work() for _ in range(CHUNKS)]) / CHUNKS for _ in range(ROUNDS)]
        return self.n_rows / statistics.median(seconds)

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the duration of some work, until the device has finished it."""
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def hidden(self, model: Model, pixels: np.ndarray, *, computed_s: float) -> float:
        """Return the share of the copies' time that a pipeline of two chunks hides."""
        staging, rows = Staging(self.device), list(pixels)
        maps = torch.zeros(pixels.shape[:3], device=self.device)

        def copies() -> None:
            staging.to_device(rows, dtype=pixels.dtype)
            self.synchronize()
            staging.to_host(maps).wait()

        def pipeline() -> None:
            flying: list[HostCopy] = []
            for _ in range(CHUNKS):
                inputs = model.inputs(staging.to_device(rows, dtype=pixels.dtype))
                flying.append(staging.to_host(_maps(model.kernel, inputs)))
                if len(flying) > 1:
                    flying.pop(0).wait()
            for each in flying:
                each.wait()

        copies()
        pipeline()
        copied_s = statistics.median(self.seconds(copies) for _ in range(ROUNDS))
        whole_s = statistics.median(self.seconds(pipeline) for _ in range(ROUNDS)) / CHUNKS
        return min(1.0, max(0.0, 1 - (whole_s - computed_s) / copied_s))

    def streamed(self, precision: Precision, pixels: np.ndarray) -> float:
        """Return the images per second that a client receives by shared memory from a server in another process."""
        flags = [*precision.flags, "--fold", "--channels-last", "--shared-memory", "/dev/shm"]
        flags += ["--max-chunk-rows", str(self.n_rows)]
        factory = "resnet18_small" if self.is_rehearsal else precision.factory
        if not self.is_rehearsal:
            flags += ["--cuda-graphs", "--device", str(self.device)]
        with (
            server(f"python:benchmarks.support.nets:{factory}", *flags) as (address, _),
            sidelight.connect(address, shared_memory=True) as client,
        ):
            batches = [pixels] * BATCHES
            _drain(client, batches[: BATCHES // 4])
            seconds = [_timed(lambda: _drain(client, batches)) for _ in range(3)]
        return BATCHES * len(pixels) / statistics.median(seconds)


def _maps(kernel: Kernel, inputs: Tensor) -> Tensor:
    """Return the maps of a gradient request, computed by the kernel."""
    answer = kernel.run(inputs, [PREDICTED] * len(inputs), [Score.PROBABILITY] * len(inputs))
    assert answer.gradients is not None
    return largest_absolute(answer.gradients)


def _drain(client: sidelight.Client, batches: list[np.ndarray]) -> None:
    assert sum(len(answer) for answer in client.stream(batches, timeout=600)) == sum(map(len, batches))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(bench: Bench) -> int:
    """Print the tables. Return 0, or 1 if a goal is missed."""
    console = Console()
    faithful = {each.name: bench.fidelity(each) for each in PRECISIONS}
    table = Table("maps against the CPU's exact ones", "rank correlation", "largest difference", "goal")
    for name, (rank, apart) in faithful.items():
        table.add_row(name, f"{rank:.5f}", f"{apart:.1e}", f"≥ {FIDELITY[name]}")
    console.print(table)
    measured = [bench.rates(each) for each in PRECISIONS]
    columns = ("seed", "ours", "faster", "graphs", "replay", "stream")
    table = Table("images/s", *columns, "kernel over seed", "stream over replay", "copies hidden")
    for each in measured:
        rates = [f"{getattr(each, name):,.0f}" for name in columns]
        ratios = [f"{each.over_seed:.2f} ×", f"{each.of_replay:.2f}", f"{each.copies_hidden:.0%}"]
        table.add_row(each.precision, *rates, *ratios)
    console.print(table)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU, a rehearsal"
    console.print(
        f"{name}, torch {torch.__version__}; chunks of {bench.n_rows}; goals: ≥ {SEED_GOAL} ×, ≥ {STREAM_GOAL}"
    )
    results = {"device": name, "torch": torch.__version__, "chunk_rows": bench.n_rows, "fidelity": faithful}
    if not bench.is_rehearsal:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results | {"rates": list(map(dataclasses.asdict, measured))}, indent=2) + "\n")
    is_met = all(rank >= FIDELITY[name] for name, (rank, _) in faithful.items())
    is_met &= all(each.over_seed >= SEED_GOAL and each.of_replay >= STREAM_GOAL for each in measured)
    return 0 if is_met else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--chunk-rows", type=int, default=64)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with a small net: to see that it runs")
    given = parser.parse_args()
    if given.rehearse:
        ROUNDS, CHUNKS, BATCHES, CHECKED = 1, 2, 4, 2
        sys.exit(main(Bench(torch.device("cpu"), n_rows=min(4, given.chunk_rows), is_rehearsal=True)))
    if not torch.cuda.is_available():
        print("no GPU: nothing was measured")
        sys.exit(2)
    sys.exit(main(Bench(torch.device(given.device), n_rows=given.chunk_rows, is_rehearsal=False)))
