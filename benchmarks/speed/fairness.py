"""Fairness: cheap calls while many long integrals run, and many callers with one image while one sends full batches."""

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import numpy as np
import sidelight
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc

from ..support.measure import Line, in_turns, ratio, server
from ..support.nets import SMALL
from ..support.requests import request

FLOOD_STEPS, FLOOD_BATCH, N_FLOODS = 300, 4, 4
N_CALLS = 150
P99_GOAL, FLOOD_GOAL = 3.0, 0.95
N_CALLERS, N_IMAGES = 64, 1024
UNARY_GOAL, STREAM_GOAL = 0.85, 0.92


def run() -> list[Line]:
    """Measure both on a ResNet-18 at 64²."""
    with server("python:benchmarks.support.nets:resnet18_small") as (address, _), sidelight.connect(address) as client:
        model = client.info().models[0]
        return [
            *asyncio.run(_beside_a_flood(address, chunk_rows=model.chunk_rows)),
            *_many_callers(address, client, batch=model.chunk_rows),
        ]


async def _beside_a_flood(address: str, *, chunk_rows: int) -> list[Line]:
    images = _images(FLOOD_BATCH)
    flood = request(images, sidelight.IntegratedGradients(steps=FLOOD_STEPS))
    call = request(images[:1], sidelight.Gradient())
    rows_of_flood = N_FLOODS * FLOOD_BATCH * (FLOOD_STEPS + 2)
    async with _stub(address) as stub:

        async def floods() -> float:
            began = time.perf_counter()
            await asyncio.gather(*(stub.Attribute(flood) for _ in range(N_FLOODS)))
            return time.perf_counter() - began

        async def calls(until: "asyncio.Task[float] | None" = None) -> list[float]:
            seconds: list[float] = []
            while len(seconds) < N_CALLS if until is None else not until.done():
                began = time.perf_counter()
                await stub.Attribute(call)
                seconds.append(time.perf_counter() - began)
            return seconds

        await calls()
        unloaded = await calls()
        solo_s = [await floods()]
        flooding = asyncio.create_task(floods())
        loaded = await calls(flooding)
        together_s = flooding.result()
        solo_s.append(await floods())
    rates = (rows_of_flood + len(loaded)) / together_s, rows_of_flood / statistics.mean(solo_s)
    chunk_s = chunk_rows / rates[1]  # the duration of the long integrals' chunks in this run
    over = (_p99(loaded) - _p99(unloaded)) / chunk_s
    share = rates[0] / rates[1]
    return [
        Line(
            what=f"p99 of gradient calls beside a flood of IG-{FLOOD_STEPS}, above the unloaded p99",
            figure=over,
            unit="chunks",
            goal=f"≤ {P99_GOAL:g}",
            met=over <= P99_GOAL,
            detail=f"{len(loaded)} calls; p99 {1e3 * _p99(unloaded):.1f} ms unloaded, {1e3 * _p99(loaded):.1f} ms "
            f"beside the flood; a chunk takes {1e3 * chunk_s:.1f} ms",
        ),
        Line(
            what="rows/s of flood and calls together over the flood alone",
            figure=share,
            unit="×",
            goal=f"≥ {FLOOD_GOAL}",
            met=share >= FLOOD_GOAL,
            detail=f"{rates[0]:.0f} and {rates[1]:.0f} rows/s",
        ),
    ]


def _many_callers(address: str, client: sidelight.Client, *, batch: int) -> list[Line]:
    images = _images(N_IMAGES)
    batches = [images[i : i + batch] for i in range(0, N_IMAGES, batch)]
    single = [request(images[i : i + 1], sidelight.Gradient(), str(i)) for i in range(N_IMAGES)]

    def one_caller() -> None:
        assert sum(len(answer) for answer in client.stream(batches)) == N_IMAGES

    def each_by(caller: Callable[..., Awaitable[None]]) -> Callable[[], None]:
        async def all_callers() -> None:
            async with _stub(address) as stub:
                await asyncio.gather(*(caller(stub, single[i::N_CALLERS]) for i in range(N_CALLERS)))

        return lambda: asyncio.run(all_callers())

    seconds = in_turns({"one": one_caller, "streams": each_by(_by_stream), "unary": each_by(_by_unary)}, rounds=5)
    lines = []
    for name, how, goal in (("unary", "by unary calls", UNARY_GOAL), ("streams", "by streams", STREAM_GOAL)):
        share = ratio(seconds["one"], seconds[name])
        lines.append(
            Line(
                what=f"{N_CALLERS} callers of one image each, {how}, over one caller of batches of {batch}",
                figure=share,
                unit="×",
                goal=f"≥ {goal}",
                met=share >= goal,
                detail=f"{N_IMAGES / statistics.median(seconds[name]):.0f} and "
                f"{N_IMAGES / statistics.median(seconds['one']):.0f} images/s",
                row=f"{N_CALLERS} callers of one image each, by unary calls / streams, over one caller of full batches",
            )
        )
    return lines


async def _by_unary(stub: attribution_pb2_grpc.AttributionServiceStub, requests: list[pb.AttributeRequest]) -> None:
    for each in requests:
        await stub.Attribute(each)


async def _by_stream(stub: attribution_pb2_grpc.AttributionServiceStub, requests: list[pb.AttributeRequest]) -> None:
    call = stub.AttributeStream()
    for each in requests:
        await call.write(pb.AttributeStreamRequest(attribute=each))
        assert (await call.read()).result.final
    await call.done_writing()


@contextlib.asynccontextmanager
async def _stub(address: str) -> AsyncIterator[attribution_pb2_grpc.AttributionServiceStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield attribution_pb2_grpc.AttributionServiceStub(channel)


def _images(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, SMALL, SMALL, 3), np.uint8)


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]
