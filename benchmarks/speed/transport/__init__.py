"""The stream, inline and in shared memory, compared with a bare gRPC echo of the same bytes. Models compute nothing.

All servers run in processes of their own and are called through raw stubs. The Python clients are compared with
these. `python -m benchmarks transport` runs only this.
"""

import asyncio
import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import sidelight_server
from torch import Tensor, nn

from ...support.measure import Line, in_turns, ratio, server
from .bare_server import METHOD, OPTIONS, process
from .clients import exchange_by_async_client, exchange_by_client
from .exchange import STREAM, exchange, exchange_shared
from .messages import CASES, Case, attribute, check_answer

CHUNK_ROWS = 32
N_IDLE, N_IDLE_CHANNELS, IDLE_GOAL_MB = 256, 8, 20
CLIENT_GOAL = 0.8
SIZES = " / ".join(case.name for case in CASES)
SHARED_GOAL = 2.5
ADDED_CASE, ADDED_GOAL_MS = "150 kB", 1.2


class First(nn.Module):
    """A model whose logits are ten of the input's elements, so that the gradient costs nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]


def costless() -> sidelight_server.ModelSpec:
    """Return a model that takes arrays of any shape and computes nothing."""
    return sidelight_server.ModelSpec(First())


def run() -> list[Line]:
    """Measure each size inline, the largest also in shared memory, and the memory of idle streams."""
    flags = ("--threads", "1", "--max-chunk-rows", str(CHUNK_ROWS))
    with (
        tempfile.TemporaryDirectory(prefix="sidelight-", dir=_memory()) as folder,
        server("python:benchmarks.speed.transport:costless", *flags, "--shared-memory", folder) as (address, _),
        process("echo") as echo,
        process("minimal") as minimal,
    ):
        lines = [line for case in CASES for line in _inline(case, address, echo, minimal)]
        lines.append(_shared(CASES[-1], address, Path(folder)))
    # A new server: one that was under load would reuse freed memory.
    flags = (*flags, "--max-peer-streams", str(2 * N_IDLE))
    with server("python:benchmarks.speed.transport:costless", *flags) as (address, pid):
        return [*lines, _idle(address, pid)]


def _inline(case: Case, address: str, echo: str, minimal: str) -> list[Line]:
    requests = [attribute(case, str(n)) for n in range(4 * case.window)]

    def exchanging(server: str, method: str, *, check: bool = True) -> Callable[[], None]:
        return lambda: asyncio.run(exchange(server, method, requests, case, check=check))

    rivals = {
        "echo": exchanging(echo, METHOD, check=False),
        "minimal": exchanging(minimal, METHOD),
        "stream": exchanging(address, STREAM),
        "connect": lambda: exchange_by_client(address, case),
        "aio.connect": lambda: asyncio.run(exchange_by_async_client(address, case)),
    }
    seconds = in_turns(rivals)
    share = ratio(seconds["echo"], seconds["stream"])
    rates = {name: case.n / statistics.median(each) for name, each in seconds.items()}
    lines = [
        Line(
            what=f"stream over a bare gRPC echo, messages of {case.name}, a model that costs nothing",
            figure=share,
            unit="×",
            goal=f"≥ {case.goal}",
            met=share >= case.goal,
            detail=f"{rates['stream']:.0f} against {rates['echo']:.0f} messages/s",
            row=f"stream over a bare gRPC echo, a model that costs nothing, messages of {SIZES}",
        ),
        Line(
            what=f"a minimal server over a bare gRPC echo, messages of {case.name}",
            figure=ratio(seconds["echo"], seconds["minimal"]),
            unit="×",
            goal="stated",
            met=True,
            detail=f"{rates['minimal']:.0f} messages/s; it has no checks, permits, fairness, deadlines or provenance",
        ),
    ]
    for name in ("connect", "aio.connect"):
        share = ratio(seconds["stream"], seconds[name])
        lines.append(
            Line(
                what=f"stream of `sidelight.{name}` over that of raw stubs, messages of {case.name}",
                figure=share,
                unit="×",
                goal=f"≥ {CLIENT_GOAL}",
                met=share >= CLIENT_GOAL,
                detail=f"{rates[name]:.0f} messages/s",
                row=f"stream of `sidelight.{name}` over that of raw stubs, messages of {SIZES}",
            )
        )
    return [*lines, _added(rates)] if case.name == ADDED_CASE else lines


def _added(rates: dict[str, float]) -> Line:
    """The time of a message minus that of an echo: decoding, encoding and the engine."""
    added_ms = 1e3 / rates["stream"] - 1e3 / rates["echo"]
    return Line(
        what=f"what the service adds to a message of {ADDED_CASE}, engine and scheduler included",
        figure=added_ms,
        unit="ms",
        goal=f"≤ {ADDED_GOAL_MS}",
        met=added_ms <= ADDED_GOAL_MS,
        detail="time a message takes in a full stream, less that in a full echo",
    )


def _shared(case: Case, address: str, folder: Path) -> Line:
    inline_requests = [attribute(case, str(n)) for n in range(4 * case.window)]

    def inline() -> None:
        asyncio.run(exchange(address, STREAM, inline_requests, case, check=True))

    def shared() -> None:
        asyncio.run(exchange_shared(address, case, folder))

    seconds = in_turns({"inline": inline, "shared": shared})
    faster = ratio(seconds["inline"], seconds["shared"])
    rate = case.n / statistics.median(seconds["shared"])
    return Line(
        what=f"shared memory over inline, messages of {case.name}",
        figure=faster,
        unit="×",
        goal=f"≥ {SHARED_GOAL:g}",
        met=faster >= SHARED_GOAL,
        detail=f"{rate:.0f} messages/s; the caller's copies into the region and out of it are counted",
        row=f"shared memory over inline, messages of {case.name}",
    )


def _idle(address: str, pid: int) -> Line:
    """Measure the memory of streams that have had one answer each and are idle."""
    process = psutil.Process(pid)

    async def measure() -> float:
        request = attribute(CASES[0], "idle")
        async with contextlib.AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(address, [*OPTIONS, ("n", n)]))
                for n in range(N_IDLE_CHANNELS)
            ]
            await asyncio.gather(*(_answered(channel, request) for channel in channels))
            before = process.memory_info().rss
            calls = [await _answered(channels[n % len(channels)], request) for n in range(N_IDLE)]
            grown = process.memory_info().rss - before
            for call in calls:
                call.cancel()
            return grown / 1e6

    grown_mb = asyncio.run(measure())
    return Line(
        what=f"memory of {N_IDLE} idle streams",
        figure=grown_mb,
        unit="MB",
        goal=f"0 to {IDLE_GOAL_MB}",
        met=0 < grown_mb < IDLE_GOAL_MB,  # 0 or less means that the measurement failed
        detail=f"resident, {1000 * grown_mb / N_IDLE:.0f} kB each, on {N_IDLE_CHANNELS} connections",
    )


async def _answered(channel: grpc.aio.Channel, request: bytes) -> grpc.aio.StreamStreamCall[bytes, bytes]:
    call = channel.stream_stream(STREAM)()
    await call.write(request)
    check_answer(await call.read())
    return call


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
