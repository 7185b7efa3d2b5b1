"""The decoder pool: worker processes that decode image files, with limits on time and memory.

Processes, because a file may keep a decoder busy for minutes or crash it, and a thread cannot be killed. Each worker is
a plain command with a socket. `multiprocessing` (and pebble, which is built on it) would import the caller's `__main__`
again in every worker (spawn, forkserver), or fork a process that has threads and perhaps CUDA.
"""

import asyncio
import contextlib
import logging
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...errors import Cancelled, ResourceExhausted, Unavailable
from ...inputs.decode_worker import BYTES_PER_PIXEL, Order
from ...telemetry.logs import Event, Throttle
from .decoder_process import Fitted, NeedsMore, Worker
from .fair_thread_pool import FairThreadPool

# Time that a worker has to finish after its call was cancelled: most do, and a new worker takes longer to start.
GRACE_S = 0.05

# Share of the memory for the pixels of all files that are decoded at once; a larger file is decoded alone. Each worker
# may take `decode_worker.SPARE_BYTES` more, of which small pictures use little.
ORDINARY_SHARE = 1 / 8
MIN_ORDINARY_PIXELS = 1_000_000


class DecoderPool:
    """A pool of up to `size` workers, each started when there is a file for it and then reused. `close` ends them.

    Files are decoded round-robin by caller, those of one caller in order. So a caller that sends many large files
    delays others by no more than the limit of one file.

    Files that take more memory than their worker's part of `memory_bytes` are decoded one at a time.
    """

    def __init__(self, size: int, *, memory_bytes: int | None = None) -> None:
        """`memory_bytes`: the limit of this process's cgroup or of the machine; None if unknown."""
        self._size = size
        self._ordinary_pixels = _ordinary_pixels(size, memory_bytes)
        self._faults = Throttle()
        self._threads = FairThreadPool(size, name="sidelight-decode")  # one thread per worker
        self._large = FairThreadPool(1, name="sidelight-decode-large")
        self._lock = threading.Lock()  # guards the fields below
        self._is_closed = False
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._ended = weakref.finalize(self, _end_all, self._all)

    def start(self) -> None:
        """Start all workers, without waiting until they are ready."""
        with self._lock:
            missing = 0 if self._is_closed else self._size - len(self._all)
        with contextlib.suppress(OSError):  # decoding the first file will report it
            for worker in [self._start() for _ in range(missing)]:
                self._return(worker)

    async def fit(self, files: Sequence[bytes], order: Order, caller: str = "") -> list[Fitted]:
        """Return each file's pixels as ordered, or its error.

        Cancelling this ends the decoding of the remaining files. Raises `Unavailable` once the pool is closed.
        """
        fitted: list[Fitted] = [Unavailable("the server is shutting down")] * len(files)
        indices = iter(range(len(files)))  # shared by the tasks

        async def fit_next() -> None:
            for index in indices:
                fitted[index] = await self.fit_one(files[index], order, caller)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(self._size, len(files))):
                tasks.create_task(fit_next())
        if self._is_closed:
            raise Unavailable("the server is shutting down")
        return fitted

    def close(self) -> None:
        """Kill all workers; files that are waiting or being decoded fail."""
        with self._lock:
            self._is_closed = True
            workers = list(self._all)
            self._idle.clear()
        for worker in workers:
            worker.kill()
        for threads in (self._threads, self._large):
            threads.close(wait=True)
        self._ended()

    async def fit_one(self, file: bytes, order: Order, caller: str = "") -> Fitted:
        """Return one file's pixels as ordered, or its error. Cancelling this ends the decoding."""
        if order.max_pixels <= self._ordinary_pixels:
            return await self._decode(file, order, caller, on=self._threads)
        ordinary = replace(order, max_pixels=self._ordinary_pixels, may_need_more=True)
        fitted = await self._decode(file, ordinary, caller, on=self._threads)
        if not isinstance(fitted, NeedsMore):
            return fitted
        return await self._decode(file, order, caller, on=self._large)

    async def _decode(self, file: bytes, order: Order, caller: str, *, on: FairThreadPool) -> Fitted:
        call = _Call(file)
        try:
            return await asyncio.wrap_future(on.submit(caller, lambda: self._run(call, order)))
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(GRACE_S, call.kill)
            raise
        except Unavailable as error:  # the pool is closed
            return error
        finally:
            call.file = None  # which may still be queued

    def _run(self, call: "_Call", order: Order) -> Fitted:
        file = call.file
        if self._is_closed or file is None:
            return Cancelled("the client has disconnected")
        try:
            worker = self._take()
        except OSError as error:
            self._faults.log(logging.ERROR, Event("decoder_not_started"), error)
            return ResourceExhausted("image file: the server could not start a process that decodes it; send it later")
        with call.of(worker):
            fitted = Cancelled("the client has disconnected") if call.file is None else worker.fit(file, order)
        self._return(worker)
        return fitted

    def _take(self) -> "Worker":
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    return worker
                self._all.discard(worker)
                worker.end()
        return self._start()

    def _start(self) -> "Worker":
        worker = Worker(self._faults)
        with self._lock:
            self._all.add(worker)
            if self._is_closed:
                worker.kill()
        return worker

    def _return(self, worker: "Worker") -> None:
        with self._lock:
            if worker.is_alive and not self._is_closed:
                self._idle.append(worker)
                return
        worker.end()
        with self._lock:
            self._all.discard(worker)


class _Call:
    """A file that waits or is being decoded, and the worker that decodes it."""

    def __init__(self, file: bytes) -> None:
        self.file: bytes | None = file  # None: no longer needed
        self._lock = threading.Lock()
        self._worker: Worker | None = None

    @contextlib.contextmanager
    def of(self, worker: Worker) -> Iterator[None]:
        with self._lock:
            self._worker = worker
        try:
            yield
        finally:
            with self._lock:
                self._worker = None

    def kill(self) -> None:
        with self._lock:
            if self._worker:
                self._worker.kill()


def _ordinary_pixels(size: int, memory_bytes: int | None) -> int:
    """Return the number of pixels up to which `size` files at once take `ORDINARY_SHARE` of the memory."""
    if memory_bytes is None:
        return sys.maxsize
    return max(MIN_ORDINARY_PIXELS, int(ORDINARY_SHARE * memory_bytes / size / BYTES_PER_PIXEL))


def _end_all(workers: set[Worker]) -> None:
    """Kill the workers of a pool that was closed or collected."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.end()
