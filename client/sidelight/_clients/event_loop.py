"""Bridges between an event loop and threads: awaits gRPC's calls, and reads an asynchronous iterable in a thread."""

import asyncio
import contextlib
from collections.abc import AsyncIterable, Callable, Iterable, Iterator
from typing import Any

import grpc

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.batch import Batch, Images
from .._inputs.images import EncodedBatch
from .._transport.channel import DIAGNOSE_EVERY_S, Connection
from .._transport.pool import WARN_AFTER_S, ConnectionPool
from ..exceptions import Cancelled

_END = object()


async def ready(pool: ConnectionPool, timeout_s: float) -> Connection:
    """Return a connected server, and wait for one if necessary. Raises `Unavailable` after the timeout."""
    if found := pool.ready_now():
        return found
    pool.forget_errors()
    changed = asyncio.Event()
    wake = from_thread(changed.set)
    log_timer = asyncio.get_running_loop().call_later(WARN_AFTER_S, pool.log_waiting)
    pool.listen(wake)
    try:
        async with asyncio.timeout(timeout_s):
            while not (found := pool.ready_now()):
                changed.clear()
                pool.check()
                pool.connect()
                with contextlib.suppress(TimeoutError):  # wakes up to find out again why there is none
                    async with asyncio.timeout(DIAGNOSE_EVERY_S):
                        await changed.wait()
        return found
    except TimeoutError:
        raise pool.unavailable(timeout_s) from None
    finally:
        log_timer.cancel()
        pool.unlisten(wake)


class CallersBatches:
    """A caller's batches as an iterator for a stream's threads. An asynchronous iterable is read in its own loop."""

    def __init__(self, batches: Iterable[Images | Batch | EncodedBatch] | AsyncIterable[Images | Batch]) -> None:
        self._loop = asyncio.get_running_loop()
        self._is_asynchronous = isinstance(batches, AsyncIterable)
        self._batches: Any = aiter(batches) if isinstance(batches, AsyncIterable) else iter(batches)
        self._reading: Any = None
        self._is_closed = False

    def __iter__(self) -> Iterator[Images | Batch | EncodedBatch]:
        return self

    def __next__(self) -> Images | Batch | EncodedBatch:
        if not self._is_asynchronous:
            batch: Images | EncodedBatch = next(self._batches)
            return batch
        if self._is_closed:
            raise StopIteration
        self._reading = asyncio.run_coroutine_threadsafe(self._step(), self._loop)
        batch = self._reading.result()
        if batch is _END:
            raise StopIteration
        return batch

    def close(self) -> None:
        """Wake a thread that waits for the next batch. Called in the loop."""
        self._is_closed = True
        if self._reading is not None:
            self._reading.cancel()

    async def _step(self) -> object:
        return await anext(self._batches, _END)


async def awaited(call: "grpc.Future[pb.AttributeResponse]") -> pb.AttributeResponse:
    """Wait for a call and return its response. Cancelling the task cancels the call."""
    done = asyncio.Event()
    wake = from_thread(done.set)
    call.add_done_callback(lambda _: wake())
    try:
        await done.wait()
    except asyncio.CancelledError:
        call.cancel()
        raise
    try:
        return call.result()
    except grpc.FutureCancelledError:
        raise Cancelled("the client was closed") from None


def from_thread(act: Callable[[], None]) -> Callable[[], None]:
    """Return a thread-safe function that calls `act` in this loop. Once the loop is closed it does nothing."""
    loop = asyncio.get_running_loop()

    def wake() -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(act)

    return wake
