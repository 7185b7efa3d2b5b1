"""Sends the messages of a case over raw stubs and receives the answers, inline or in shared memory."""

import asyncio
import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
from sidelight.v1 import attribution_pb2 as pb

from .bare_server import OPTIONS
from .messages import Case, attribute_slot, check_answer, registration

STREAM = "/sidelight.v1.AttributionService/AttributeStream"


async def exchange(address: str, method: str, requests: Sequence[bytes], case: Case, *, check: bool) -> None:
    """Send and receive messages, with at most a window of them unanswered."""
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
                check_answer(response)
            n_received += 1
            room.release()
        await sending
        assert n_received == case.n


async def exchange_shared(address: str, case: Case, folder: Path) -> None:
    """Do the same through a region: the caller writes each batch into a slot and reads its maps from there."""
    images = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32)
    maps = np.empty_like(images)
    slot_bytes = 2 * case.n_bytes
    async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
        call = channel.stream_stream(STREAM)()
        with _region(folder, slot_bytes * case.window) as file:
            await call.write(registration(file.name, slot_bytes * case.window))
            assert pb.AttributeStreamResponse.FromString(await call.read()).HasField("region_registered")
            os.unlink(file.path)
            free: asyncio.Queue[int] = asyncio.Queue()
            for slot in range(case.window):
                free.put_nowait(slot)
            requests = [attribute_slot(case, file.name, slot, slot_bytes) for slot in range(case.window)]

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
                slot = int(check_answer(response))
                at = slot * slot_bytes + case.n_bytes
                maps.data.cast("B")[:] = memoryview(file.mapped)[at : at + case.n_bytes]
                n_received += 1
                free.put_nowait(slot)
            await sending
            assert n_received == case.n


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
