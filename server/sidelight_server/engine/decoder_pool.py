"""The decoder pool: worker processes that decode image files, with limits on time and memory.

Processes, because a file may keep a decoder busy for minutes or crash it, and a thread cannot be killed. Each worker is
a plain command with a socket. `multiprocessing` (and pebble, which is built on it) would import the caller's `__main__`
again in every worker (spawn, forkserver), or fork a process that has threads and perhaps CUDA.
"""

import asyncio
import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..domain import Array
from ..errors import (
    Cancelled,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    SidelightError,
    Unavailable,
)
from ..inputs.decode_worker import HEAD, MAX_MESSAGE_BYTES, OK, READY, REPLY, Order
from ..inputs.preprocessing import Geometry
from ..telemetry.logs import Event, Throttle

Fitted = tuple[Array, Geometry | None] | SidelightError

WALL_TIMES = 10  # limit of wall time, as a multiple of the limit of CPU time (max_decode_s)
START_S = 60.0  # limit for a worker's start, which takes 0.2 s on an idle machine
# Time that a worker has to finish after its call was cancelled: most do, and a new worker takes longer to start.
GRACE_S = 0.05
END_S = 1.0  # time that a worker has to exit by itself before it is killed

_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from sidelight_server.inputs.decode_worker import main; main()"
_PARENT = str(Path(__file__).parent.parent.parent)
_FAILURES = {each.code: each for each in (InvalidArgument, FailedPrecondition, ResourceExhausted)}
# One thread and one malloc arena, because reserved address space counts toward the memory limit. Freed memory returns
# to the system at once; huge pages make up for it: without them an image of 12 megapixels takes half as long again.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
    "MALLOC_TOP_PAD_": str(8 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}  # fmt: skip


class DecoderPool:
    """A pool of up to `size` workers, each started when there is a file for it and then reused. `close` ends them.

    Files are decoded round-robin by caller, those of one caller in order. So a caller that sends many large files
    delays others by no more than the limit of one file.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._faults = Throttle()
        self._queue = _Queue()
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="sidelight-decode")  # one thread per worker
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
        """Return each file's pixels in the model's input size, or its error.

        Cancelling this ends the decoding of the remaining files. Raises `Unavailable` once the pool is closed.
        """
        fitted: list[Fitted] = [Unavailable("the server is shutting down")] * len(files)
        indices = iter(range(len(files)))  # shared by the tasks

        async def fit_next() -> None:
            for index in indices:
                fitted[index] = await self._fit(files[index], order, caller)

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
        self._threads.shutdown(wait=True)
        self._ended()

    async def _fit(self, file: bytes, order: Order, caller: str) -> Fitted:
        call = _Call(file)
        try:
            fitted = self._queue.add(caller, lambda: self._run(call, order))
            self._threads.submit(self._queue.run_next)
            return await asyncio.wrap_future(fitted)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(GRACE_S, call.kill)
            raise
        except RuntimeError:  # the thread pool is shut down
            if not self._is_closed:
                raise
            return Unavailable("the server is shutting down")
        finally:
            call.end()

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


class Worker:
    """A worker process that decodes one file at a time, and the server's end of its socket."""

    def __init__(self, faults: Throttle) -> None:
        self._faults = faults
        self._socket, theirs = socket.socketpair()
        self._is_ready = self._has_ended = False
        with theirs:
            paths = [*map(str, sys.path), _PARENT]
            self.process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603  (no input of a caller)
                # -S: the hooks of `site` may import anything. The worker uses this process's `sys.path` instead.
                [sys.executable, "-S", "-W", "ignore", "-c", _BOOT, *paths],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,  # Ctrl-C reaches the server only
            )

    @property
    def is_alive(self) -> bool:
        """Whether the worker can decode another file."""
        return not self._has_ended and self.process.poll() is None

    def kill(self) -> None:
        """Kill the process without waiting; `end` waits."""
        self._has_ended = True
        self.process.kill()

    def end(self) -> int:
        """Wait for the process to exit, killing it after `END_S`; return its exit status."""
        self._has_ended = True
        self._socket.close()
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def fit(self, file: bytes, order: Order) -> Fitted:
        """Return a file's pixels, uint8 [H, W, C] of the model's input size, or its error."""
        wall_s = WALL_TIMES * order.max_s
        try:
            self._wait_until_ready()
            until_s = time.monotonic() + wall_s
            pickled = pickle.dumps(order)
            self._socket.settimeout(wall_s)
            self._socket.sendall(HEAD.pack(len(pickled), len(file)) + pickled)
            self._socket.sendall(file)
            return self._reply(order, until_s)
        except TimeoutError:
            self.kill()
            return ResourceExhausted(
                f"image file: decoding did not end within {wall_s:g} s ({WALL_TIMES} times max_decode_s); the server "
                "is busy, send it later"
            )
        except (OSError, EOFError):  # the process has exited or was killed
            return self._why(order)
        except SidelightError as error:
            return error

    def _wait_until_ready(self) -> None:
        if not self._is_ready:
            self._socket.settimeout(START_S)
            if self._socket.recv(1) != READY:
                raise EOFError
            self._is_ready = True

    def _reply(self, order: Order, until_s: float) -> Fitted:
        """Read and validate the reply. It is not trusted: a malicious file may have taken over the worker."""
        status, is_last, height, width, n_bytes = REPLY.unpack(self._receive(REPLY.size, until_s))
        preprocessing = order.preprocessing
        shape = preprocessing.height, preprocessing.width, preprocessing.channels
        if n_bytes > MAX_MESSAGE_BYTES and (status != OK or n_bytes != np.prod(shape)):
            raise EOFError
        body = self._receive(n_bytes, until_s)
        if is_last:
            self._has_ended = True
        if status == OK and n_bytes == np.prod(shape) and min(height, width) > 0:
            return np.frombuffer(body, np.uint8).reshape(shape), preprocessing.geometry(height, width)
        message = body.decode(errors="replace")
        if status in _FAILURES:
            return _FAILURES[status](message)
        self._faults.log(logging.ERROR, Event("decoder_failed", traceback=message))
        return Internal("image file: the server failed to decode it; its log has the cause")

    def _receive(self, n_bytes: int, until_s: float) -> bytearray:
        buffer = bytearray(n_bytes)
        view = memoryview(buffer)
        while view:
            self._socket.settimeout(max(1e-3, until_s - time.monotonic()))
            n = self._socket.recv_into(view)
            if not n:
                raise EOFError
            view = view[n:]
        return buffer

    def _why(self, order: Order) -> SidelightError:
        if self._has_ended:
            return Cancelled("the client has disconnected")
        status = self.end()
        if status == -signal.SIGPROF:
            return InvalidArgument(f"image file: decoding took more than {order.max_s:g} s of CPU time (max_decode_s)")
        self._faults.log(logging.WARNING, Event("decoder_died", status=_status(status), was_ready=self._is_ready))
        if not self._is_ready:
            return Internal("image file: the process that decodes it did not start; the server's log has the cause")
        if status == -signal.SIGKILL:
            return ResourceExhausted("image file: the system ended its decoder, as it does if memory is short")
        return InvalidArgument("image file: its decoder crashed on it")


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
        yield
        with self._lock:
            self._worker = None

    def end(self) -> None:
        """Drop the file, which may still be queued."""
        self.file = None

    def kill(self) -> None:
        with self._lock:
            if self._worker:
                self._worker.kill()


class _Queue:
    """Queue of decoding functions, round-robin by caller; those of one caller in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In round-robin order; no deque is empty.
        self._callers: dict[str, deque[tuple[Future[Fitted], Callable[[], Fitted]]]] = {}

    def add(self, caller: str, decode: Callable[[], Fitted]) -> "Future[Fitted]":
        future: Future[Fitted] = Future()
        with self._lock:
            self._callers.setdefault(caller, deque()).append((future, decode))
        return future

    def run_next(self) -> None:
        """Decode the next file. Called once for each that was added."""
        with self._lock:
            caller, waiting = next(iter(self._callers.items()))
            del self._callers[caller]
            future, decode = waiting.popleft()
            if waiting:
                self._callers[caller] = waiting
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(decode())
        except BaseException as error:
            future.set_exception(error)


def _status(status: int) -> str:
    """Return a process's exit status as text: the signal's name or the number."""
    return signal.Signals(-status).name if status < 0 else str(status)


def _end_all(workers: set[Worker]) -> None:
    """Kill the workers of a pool that was closed or collected."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.end()
