"""The service compared with its own kernel: the overhead of a stream and of a unary call."""

import statistics
import time

import numpy as np
import sidelight
import torch
from sidelight_server.compute.kernel import Kernel
from sidelight_server.compute.torch_device import cpu_quota
from sidelight_server.config.options import KernelOptions

from ..support.measure import Line, in_turns, ratio, server
from ..support.nets import SIZE, resnet18
from .kernel import maps

BATCH = 8
N_BATCHES = 16
N_CALLS = 200
STREAM_GOAL = 0.97
HALF = KernelOptions(precision="bfloat16", fold=True, channels_last=True)
CALL_GOAL_MS = 1.5


def run() -> list[Line]:
    """Measure a stream of batches, and one call of one image, both of uint8 pixels of ResNet-18 at 224²."""
    torch.set_num_threads(cpu_quota())
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8) for _ in range(N_BATCHES)]
    lines = []
    for options in (KernelOptions(), HALF):
        precision = ("--precision", options.precision) if options.precision else ()
        flags = (*precision, *(f"--{name.replace('_', '-')}" for name in options.names))
        with (
            server("python:benchmarks.support.nets:resnet18", *flags) as (address, _),
            sidelight.connect(address) as client,
        ):
            lines.append(_stream(client, batches, options))
            if options.is_exact:
                lines.append(_call(client, batches[0][:1]))
    return lines


def _stream(client: sidelight.Client, batches: list[np.ndarray], options: KernelOptions) -> Line:
    floats = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    kernel = Kernel(resnet18().module, device=torch.device("cpu"), options=options, trial=floats[:2])

    def stream() -> None:
        assert sum(len(answer) for answer in client.stream(batches)) == N_BATCHES * BATCH

    def alone() -> None:
        for _ in batches:
            maps(kernel, floats)

    seconds = in_turns({"kernel": alone, "stream": stream})
    share = ratio(seconds["kernel"], seconds["stream"])
    return Line(
        what=f"stream over its kernel's own rate, ResNet-18, uint8 batches of {BATCH}, {kernel.summary}",
        figure=share,
        unit="×",
        goal=f"≥ {STREAM_GOAL}",
        met=share >= STREAM_GOAL,
        detail=f"{N_BATCHES * BATCH / statistics.median(seconds['stream']):.1f} images/s through the stream",
        row=f"stream over its kernel's own rate, ResNet-18, uint8 batches of {BATCH}: float32 / bfloat16, folded",
    )


def _call(client: sidelight.Client, image: np.ndarray) -> Line:
    """Compare each call with the chunk's own time in the same answer.

    A kernel in another process is no reference: on a shared machine the two differ by more than the overhead.
    """
    called, computed = [], []
    for _ in range(N_CALLS):
        began = time.perf_counter()
        answer = client.attribute(image)
        called.append((time.perf_counter() - began) * 1e3)
        computed.append(answer.timing.compute_s * 1e3)
    call_ms, chunk_ms = statistics.median(called), statistics.median(computed)
    over = statistics.median(call - compute for call, compute in zip(called, computed, strict=True))
    return Line(
        what="one unloaded unary call over its own chunk's time, ResNet-18",
        figure=over,
        unit="ms",
        goal=f"≤ {CALL_GOAL_MS}",
        met=over <= CALL_GOAL_MS,
        detail=f"medians of {N_CALLS}: call {call_ms:.1f} ms, chunk {chunk_ms:.1f} ms",
        row="one unloaded unary call over its own chunk's time, ResNet-18",
    )
