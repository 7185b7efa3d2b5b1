"""The stream against a bare gRPC echo of the same bytes, and shared memory against both, on a model that costs nothing.

Both servers are processes of their own, both clients the same few lines of raw stubs. `python -m benchmarks.transport`.
"""

import argparse
import asyncio
import contextlib
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import psutil
import sidelight_server
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from torch import Tensor, nn

from .measure import Line, in_turns, ratio, report, server

STREAM = "/sidelight.v1.AttributionService/AttributeStream"
ECHO = "/bare/Echo"
LIMIT_BYTES = 64 * 1024 * 1024
OPTIONS = [("grpc.max_receive_message_length", LIMIT_BYTES), ("grpc.max_send_message_length", LIMIT_BYTES)]
RESULT_TAG = 0x12  # the field of AttributeStreamResponse behind the id
CHUNK_ROWS = 32
N_IDLE, N_IDLE_CHANNELS, IDLE_GOAL_MB = 256, 8, 20
SHARED_GOAL = 3.0
ADDED_CASE, ADDED_GOAL_MS = "150 kB", 1.2


class Case(NamedTuple):
    """Messages of one size."""

    name: str
    shape: tuple[int, int, int, int]  # of the images and, without channel reduction, of the maps; float32
    n: int  # messages of a round
    window: int
    goal: float

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * 4


CASES = (
    Case("1 kB", (1, 3, 9, 9), 3000, 32, 0.5),
    Case("150 kB", (1, 3, 112, 112), 800, 32, 0.5),
    Case("600 kB", (1, 3, 224, 224), 300, 16, 0.5),
    Case("4.8 MB", (8, 3, 224, 224), 60, 8, 0.9),
)


class First(nn.Module):
    """Logits that are ten of the input's elements: the gradient is there at once."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]


def costless() -> sidelight_server.ModelSpec:
    """Return a model that takes arrays of any shape and computes nothing."""
    return sidelight_server.ModelSpec(First())


def run() -> list[Line]:
    """Measure each size inline, the largest in shared memory too, and what idle streams hold."""
    flags = ("--threads", "1", "--max-chunk-rows", str(CHUNK_ROWS))
    with (
        tempfile.TemporaryDirectory(prefix="sidelight-", dir=_memory()) as folder,
        server("python:benchmarks.transport:costless", *flags, "--shared-memory", folder) as (address, _),
        _echo() as echo,
    ):
        lines = [line for case in CASES for line in _inline(case, address, echo)]
        lines.append(_shared(CASES[-1], address, Path(folder)))
    # A server of its own: after a load, memory that was freed is reused or given back, and the figure would be chance.
    with server("python:benchmarks.transport:costless", *flags) as (address, pid):
        return [*lines, _idle(address, pid)]


def _inline(case: Case, address: str, echo: str) -> list[Line]:
    requests = [_request(case, str(n)) for n in range(4 * case.window)]

    def stream() -> None:
        asyncio.run(_exchange(address, STREAM, requests, case, check=True))

    def bare() -> None:
        asyncio.run(_exchange(echo, ECHO, requests, case, check=False))

    seconds = in_turns({"echo": bare, "stream": stream})
    share = ratio(seconds["echo"], seconds["stream"])
    rates = {name: case.n / statistics.median(each) for name, each in seconds.items()}
    line = Line(
        what=f"stream over a bare gRPC echo, messages of {case.name}, a model that costs nothing",
        figure=share,
        unit="×",
        goal=f"≥ {case.goal}",
        met=share >= case.goal,
        detail=f"{rates['stream']:.0f} against {rates['echo']:.0f} messages/s",
    )
    return [line, _added(rates)] if case.name == ADDED_CASE else [line]


def _added(rates: dict[str, float]) -> Line:
    """Decoding and encoding are a part of what a message takes beyond an echo: the engine's work is the rest."""
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
    inline_requests = [_request(case, str(n)) for n in range(4 * case.window)]

    def inline() -> None:
        asyncio.run(_exchange(address, STREAM, inline_requests, case, check=True))

    def shared() -> None:
        asyncio.run(_exchange_shared(address, case, folder))

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
    )


def _idle(address: str, pid: int) -> Line:
    """Open streams that have had one answer each and stay silent."""
    process = psutil.Process(pid)

    async def measure() -> float:
        request = _request(CASES[0], "idle")
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
        met=0 < grown_mb < IDLE_GOAL_MB,  # nothing, or less, is no measurement
        detail=f"resident, {1000 * grown_mb / N_IDLE:.0f} kB each, on {N_IDLE_CHANNELS} connections",
    )


async def _answered(channel: grpc.aio.Channel, request: bytes) -> grpc.aio.StreamStreamCall[bytes, bytes]:
    call = channel.stream_stream(STREAM)()
    await call.write(request)
    _check(await call.read())
    return call


async def _exchange(address: str, method: str, requests: Sequence[bytes], case: Case, *, check: bool) -> None:
    """Send and receive, a window of messages under way."""
    async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
        call = channel.stream_stream(method)()
        room = asyncio.Semaphore(case.window)

        async def send() -> None:
            for n in range(case.n):
                await room.acquire()
                await call.write(requests[n % len(requests)])
            await call.done_writing()

        sending = asyncio.create_task(send())
        n_received = 0
        while (response := await call.read()) is not grpc.aio.EOF:
            if check:
                _check(response)
            n_received += 1
            room.release()
        await sending
        assert n_received == case.n


async def _exchange_shared(address: str, case: Case, folder: Path) -> None:
    """Do the same through a region: the caller writes each batch into a slot, and reads its maps out of it."""
    images = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32)
    maps = np.empty_like(images)
    slot_bytes = 2 * case.n_bytes
    async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
        call = channel.stream_stream(STREAM)()
        with _region(folder, slot_bytes * case.window) as file:
            await call.write(_registration(file.name, slot_bytes * case.window))
            assert pb.AttributeStreamResponse.FromString(await call.read()).HasField("region_registered")
            os.unlink(file.path)
            free: asyncio.Queue[int] = asyncio.Queue()
            for slot in range(case.window):
                free.put_nowait(slot)
            requests = [_slot_request(case, file.name, slot, slot_bytes) for slot in range(case.window)]

            async def send() -> None:
                for _ in range(case.n):
                    slot = await free.get()
                    at = slot * slot_bytes
                    file.mapped[at : at + case.n_bytes] = images.data.cast("B")
                    await call.write(requests[slot])
                await call.done_writing()

            sending = asyncio.create_task(send())
            n_received = 0
            while (response := await call.read()) is not grpc.aio.EOF:
                slot = int(_check(response))
                at = slot * slot_bytes + case.n_bytes
                maps.data.cast("B")[:] = memoryview(file.mapped)[at : at + case.n_bytes]
                n_received += 1
                free.put_nowait(slot)
            await sending
            assert n_received == case.n


def _check(response: bytes) -> bytes:
    """Return the id of an answer, which must be a result."""
    end = 2 + response[1]
    assert response[end] == RESULT_TAG, pb.AttributeStreamResponse.FromString(response).failure
    return response[2:end]


def _request(case: Case, id_: str) -> bytes:
    data = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32).tobytes()
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=case.shape, data=data)
    return _asking(id_, tensor_pb2.Images(tensor=tensor), pb.Output())


def _slot_request(case: Case, region: str, slot: int, slot_bytes: int) -> bytes:
    at = slot * slot_bytes
    images = tensor_pb2.SharedTensor(
        region=region, offset_bytes=at, dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=case.shape
    )
    output = pb.Output(region=tensor_pb2.SharedTensor(region=region, offset_bytes=at + case.n_bytes))
    return _asking(str(slot), tensor_pb2.Images(shared=images), output)


def _asking(id_: str, images: tensor_pb2.Images, output: pb.Output) -> bytes:
    request = pb.AttributeRequest(
        id=id_,
        images=images,
        target=pb.Target(predicted=pb.PredictedTarget()),
        method=pb.Method(gradient=pb.GradientMethod()),
        channels=pb.CHANNEL_REDUCTION_NONE,
        output=output,
    )
    return pb.AttributeStreamRequest(attribute=request).SerializeToString()


def _registration(region: str, size: int) -> bytes:
    request = pb.RegisterRegionRequest(id="region", region=region, size_bytes=size)
    return pb.AttributeStreamRequest(register_region=request).SerializeToString()


class _File(NamedTuple):
    mapped: mmap.mmap
    path: Path

    @property
    def name(self) -> str:
        return self.path.name


@contextlib.contextmanager
def _region(folder: Path, size: int) -> Iterator[_File]:
    number, path = tempfile.mkstemp(dir=folder)
    try:
        os.posix_fallocate(number, 0, size)
        with mmap.mmap(number, size) as mapped:
            yield _File(mapped, Path(path))
    finally:
        os.close(number)


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@contextlib.contextmanager
def _echo() -> Iterator[str]:
    """Run the bare echo as a process of its own; give its address."""
    root = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory(prefix="sidelight-") as folder:
        address = f"unix:{folder}/socket"
        command = [sys.executable, "-m", "benchmarks.transport", "--echo", address]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
            try:
                assert process.stdout
                assert process.stdout.readline() == "serving\n"
                yield address
            finally:
                process.terminate()


async def _serve_echo(address: str) -> None:
    """Give every message back: what gRPC itself costs in Python."""

    async def echo(_: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    bare = grpc.aio.server(options=OPTIONS)
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    bare.add_insecure_port(address)
    await bare.start()
    print("serving", flush=True)
    await bare.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--echo", metavar="ADDRESS", help="only serve the echo")
    chosen = parser.parse_args()
    if chosen.echo:
        asyncio.run(_serve_echo(chosen.echo))
    else:
        sys.exit(report(run()))
