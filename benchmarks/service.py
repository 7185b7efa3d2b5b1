"""The service against its own kernel: what streaming and one unary call cost on top, from a process of their own."""

import statistics

import numpy as np
import sidelight
import torch
from sidelight_server.device import cpu_quota
from sidelight_server.kernel import Kernel

from .kernel import maps
from .measure import Line, in_turns, ratio, server
from .nets import SIZE, resnet18

BATCH = 8
N_BATCHES = 16
N_CALLS = 5
STREAM_GOAL = 0.95
CALL_GOAL_MS = 3.0


def run() -> list[Line]:
    """Measure a stream of batches, and one call of one image, both of uint8 pixels of ResNet-18 at 224²."""
    torch.set_num_threads(cpu_quota())
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8) for _ in range(N_BATCHES)]
    kernel = Kernel(resnet18().module, device=torch.device("cpu"), outputs="logits")
    floats = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with server("python:benchmarks.nets:resnet18") as (address, _), sidelight.connect(address) as client:
        return [_stream(client, batches, kernel, floats), _call(client, batches[0][:1], kernel, floats[:1])]


def _stream(client: sidelight.Client, batches: list[np.ndarray], kernel: Kernel, floats: torch.Tensor) -> Line:
    def stream() -> None:
        assert sum(len(answer) for answer in client.stream(batches)) == N_BATCHES * BATCH

    def alone() -> None:
        for _ in batches:
            maps(kernel, floats)

    seconds = in_turns({"kernel": alone, "stream": stream})
    share = ratio(seconds["kernel"], seconds["stream"])
    return Line(
        what=f"stream over its kernel's own rate, ResNet-18, batches of {BATCH}",
        figure=share,
        unit="×",
        goal=f"≥ {STREAM_GOAL}",
        met=share >= STREAM_GOAL,
        detail=f"{N_BATCHES * BATCH / statistics.median(seconds['stream']):.1f} images/s through the stream",
    )


def _call(client: sidelight.Client, image: np.ndarray, kernel: Kernel, floats: torch.Tensor) -> Line:
    def calls() -> None:
        for _ in range(N_CALLS):
            client.attribute(image)

    def alone() -> None:
        for _ in range(N_CALLS):
            maps(kernel, floats)

    seconds = in_turns({"kernel": alone, "call": calls}, rounds=15)
    over = [(a - b) / N_CALLS * 1e3 for a, b in zip(seconds["call"], seconds["kernel"], strict=True)]
    added = statistics.median(over)
    return Line(
        what="one unloaded unary call over its kernel's own time, ResNet-18",
        figure=added,
        unit="ms",
        goal=f"≤ {CALL_GOAL_MS}",
        met=added <= CALL_GOAL_MS,
        detail=f"kernel {statistics.median(seconds['kernel']) / N_CALLS * 1e3:.1f} ms",
    )
