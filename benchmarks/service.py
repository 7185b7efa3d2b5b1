"""The service against its own kernel: what streaming and one unary call cost on top, from a process of their own."""

import statistics
import time

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
N_TURNS, N_CALLS = 12, 8
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
    turns = {"kernel": lambda: maps(kernel, floats), "call": lambda: client.attribute(image)}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(N_TURNS):
        for name, turn in turns.items():
            turn()  # not counted: while it runs, the other's idle workers still spin
            for _ in range(N_CALLS):
                began = time.perf_counter()
                turn()
                seconds[name].append(time.perf_counter() - began)
    alone, called = (statistics.median(seconds[name]) * 1e3 for name in turns)
    return Line(
        what="one unloaded unary call over its kernel's own time, ResNet-18",
        figure=called - alone,
        unit="ms",
        goal=f"≤ {CALL_GOAL_MS}",
        met=called - alone <= CALL_GOAL_MS,
        detail=f"medians of {N_TURNS * N_CALLS}: call {called:.1f} ms, kernel {alone:.1f} ms",
    )
