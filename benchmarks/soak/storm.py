"""Thousands of calls, half of them cancelled at random moments. `python -m benchmarks.soak.storm`."""

import argparse
import asyncio
import random
import sys
import time

import grpc
import numpy as np
import psutil
import sidelight
from sidelight.v1 import attribution_pb2_grpc

from ..support.held import growth, settled
from ..support.measure import Line, report, server
from ..support.nets import SMALL
from ..support.requests import request

N_REQUESTS, AT_ONCE = 10_000, 64

METHODS = (
    sidelight.Gradient(),
    sidelight.SmoothGrad(samples=8),
    sidelight.IntegratedGradients(steps=20),
    sidelight.IntegratedGradients(tolerance=0.01),
    sidelight.GradCAM(),
    sidelight.Occlusion(window=16),
)


def run(n_requests: int = N_REQUESTS) -> list[Line]:
    """Run twice, and compare what the server holds after each run. The next call must be served at once."""
    with (
        server("python:benchmarks.support.nets:trimmed_cnn") as (address, pid),
        sidelight.connect(address) as client,
    ):
        process = psutil.Process(pid)
        client.attribute(_images(1))
        asyncio.run(_storm(address, n_requests // 2))
        before = settled(process)
        counts = asyncio.run(_storm(address, n_requests))
        began = time.perf_counter()
        client.attribute(_images(1))
        next_s = time.perf_counter() - began
        after = settled(process, before)
        info = client.info()
        cancelled = info.cancellations
        chunk = next(entry for entry in info.models[0].warmup if entry.chosen)
        chunk_s = chunk.rows / chunk.rows_per_second
    cancelled, answered = counts
    return [
        growth(
            f"over {n_requests} requests, half of them cancelled",
            before,
            after,
            detail=f"{cancelled} cancelled, {answered} answered",
        ),
        Line(
            what="stop of cancelled work, the mean",
            figure=1e3 * cancelled.mean_s,
            unit="ms",
            goal=f"≤ two unloaded chunks, {2e3 * chunk_s:.0f} ms",  # under load, chunks take longer
            met=cancelled.mean_s <= 2 * chunk_s,
            detail=f"{cancelled.count} with a row at the device, {1e3 * cancelled.longest_s:.1f} ms the longest; "
            f"the next call took {1e3 * next_s:.1f} ms",
        ),
    ]


async def _storm(address: str, n_requests: int) -> tuple[int, int]:
    rng, gate = random.Random(0), asyncio.Semaphore(AT_ONCE)
    images = _images(4)
    counts = [0, 0]

    async def one(n: int, stub: attribution_pb2_grpc.AttributionServiceStub) -> None:
        message = request(images[: 1 + n % 4], METHODS[n % len(METHODS)])
        async with gate:
            call = stub.Attribute(message)
            if n % 2:
                await asyncio.sleep(rng.random() * 0.1)
                call.cancel()
            try:
                reply = await call
            except asyncio.CancelledError:
                counts[0] += 1
            else:
                assert not reply.result.failures
                counts[1] += 1

    async with grpc.aio.insecure_channel(address) as channel:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        await asyncio.gather(*(one(n, stub) for n in range(n_requests)))
    return counts[0], counts[1]


def _images(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, SMALL, SMALL, 3), np.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=N_REQUESTS)
    sys.exit(report(run(parser.parse_args().requests)))
