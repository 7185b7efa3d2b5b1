"""The decoder pool: processes that decode files, with bounded time and memory. One ends with its call.

A thread cannot be ended, and a file may keep its decoder busy for minutes or break it. The workers are plain commands
behind a socket each. The pools of multiprocessing, and pebble, which stands on it, would import the caller's `__main__`
again in every worker (spawn, forkserver), or copy a process that has threads and perhaps CUDA (fork).
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

WALL_TIMES = 10  # seconds that decoding may take for each second of CPU time that it may take
START_S = 60.0  # that a worker may take until it is ready: 0.2 s on a machine that is not busy
# That a decoder may go on after its call was cancelled: most are done by then, and a new worker takes longer.
GRACE_S = 0.05
END_S = 1.0  # that a worker may take to end by itself

_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from sidelight_server.inputs.decode_worker import main; main()"
_PARENT = str(Path(__file__).parent.parent.parent)
_FAILURES = {each.code: each for each in (InvalidArgument, FailedPrecondition, ResourceExhausted)}
# One thread, and one arena: what is reserved for more counts as memory. What is freed goes back at once; with pages of
# the usual size fresh memory would cost a picture of 12 megapixels half as much time again.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
    "MALLOC_TOP_PAD_": str(8 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}  # fmt: skip


class DecoderPool:
    """A pool of `size` workers at most, each begun when there is a file for it and kept. `close` ends them all.

    Callers take turns, file by file, and a caller's requests among themselves: whoever brings many large files keeps
    nobody out for longer than the bound of one.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._faults = Throttle()
        self._turns = _Turns()
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="sidelight-decode")  # each waits for one worker
        self._lock = threading.Lock()  # over what follows
        self._is_closed = False
        self._idle: list[Worker] = []
        self._all: set[Worker] = set()
        self._ended = weakref.finalize(self, _end_all, self._all)

    def start(self) -> None:
        """Begin all workers, without waiting until they are ready."""
        with self._lock:
            missing = 0 if self._is_closed else self._size - len(self._all)
        with contextlib.suppress(OSError):  # the first file tells
            for worker in [self._begin() for _ in range(missing)]:
                self._give_back(worker)

    async def fit(self, files: Sequence[bytes], order: Order, caller: str = "") -> list[Fitted]:
        """Return each file's pixels in the model's input size, or what is wrong with it.

        What is left of it ends when this is cancelled. `Unavailable` once closed.
        """
        fitted: list[Fitted] = [Unavailable("the server is shutting down")] * len(files)
        places = iter(range(len(files)))

        async def lane() -> None:
            for place in places:
                fitted[place] = await self._fit(files[place], order, caller)

        async with asyncio.TaskGroup() as lanes:
            for _ in range(min(self._size, len(files))):
                lanes.create_task(lane())
        if self._is_closed:
            raise Unavailable("the server is shutting down")
        return fitted

    def close(self) -> None:
        """End all workers, and with them what waits for one."""
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
            fitted = self._turns.add(caller, lambda: self._run(call, order))
            self._threads.submit(self._turns.run_next)
            return await asyncio.wrap_future(fitted)
        except asyncio.CancelledError:
            asyncio.get_running_loop().call_later(GRACE_S, call.kill)
            raise
        except RuntimeError:  # the pool takes nothing more
            if not self._is_closed:
                raise
            return Unavailable("the server is shutting down")
        finally:
            call.end()

    def _run(self, call: "_Call", order: Order) -> Fitted:
        file = call.file
        if self._is_closed or file is None:
            return Cancelled("the caller has gone")
        try:
            worker = self._take()
        except OSError as error:
            self._faults.log(logging.ERROR, Event("decoder_not_started"), error)
            return ResourceExhausted("image file: the server could not start a process that decodes it; send it later")
        with call.of(worker):
            fitted = Cancelled("the caller has gone") if call.file is None else worker.fit(file, order)
        self._give_back(worker)
        return fitted

    def _take(self) -> "Worker":
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    return worker
                self._all.discard(worker)
                worker.end()
        return self._begin()

    def _begin(self) -> "Worker":
        worker = Worker(self._faults)
        with self._lock:
            self._all.add(worker)
            if self._is_closed:
                worker.kill()
        return worker

    def _give_back(self, worker: "Worker") -> None:
        with self._lock:
            if worker.is_alive and not self._is_closed:
                self._idle.append(worker)
                return
        worker.end()
        with self._lock:
            self._all.discard(worker)


class Worker:
    """A process that decodes one file at a time, and the server's end of its socket."""

    def __init__(self, faults: Throttle) -> None:
        self._faults = faults  # the log's
        self._socket, theirs = socket.socketpair()
        self._is_ready = self._has_ended = False
        with theirs:
            paths = [*map(str, sys.path), _PARENT]
            self.process: subprocess.Popen[bytes] = subprocess.Popen(  # noqa: S603  (nothing of a caller's is in it)
                # Without `site`, whose hooks may import anything: the modules are found where this process finds them.
                [sys.executable, "-S", "-W", "ignore", "-c", _BOOT, *paths],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,  # Ctrl-C is for the server
            )

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked for another file."""
        return not self._has_ended and self.process.poll() is None

    def kill(self) -> None:
        """End it at once. It is `end` that waits for that."""
        self._has_ended = True
        self.process.kill()

    def end(self) -> int:
        """Wait for its end, which is brought about where it does not come by itself. Returns its exit status."""
        self._has_ended = True
        self._socket.close()
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def fit(self, file: bytes, order: Order) -> Fitted:
        """Return a file's pixels, uint8 [H, W, C] of the model's input size, or what is wrong with it."""
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
        except (OSError, EOFError):  # it has ended, or was ended
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
        """Read the reply. Nothing of it is believed: the file may have made something else of the worker."""
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
            return Cancelled("the caller has gone")
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
    """One file on its way, and which worker has it."""

    def __init__(self, file: bytes) -> None:
        self.file: bytes | None = file  # None: nobody waits for it
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
        """Let go of the file, which may wait for its turn still."""
        self.file = None

    def kill(self) -> None:
        with self._lock:
            if self._worker:
                self._worker.kill()


class _Turns:
    """Files that wait, each as the function that decodes it: in turn by caller, those of a caller in their order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callers: dict[str, deque[tuple[Future[Fitted], Callable[[], Fitted]]]] = {}  # in turn; none is empty

    def add(self, caller: str, decode: Callable[[], Fitted]) -> "Future[Fitted]":
        future: Future[Fitted] = Future()
        with self._lock:
            self._callers.setdefault(caller, deque()).append((future, decode))
        return future

    def run_next(self) -> None:
        """Decode one file. Called once for each that was added."""
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
    """Return a process's exit status in words."""
    return signal.Signals(-status).name if status < 0 else str(status)


def _end_all(workers: set[Worker]) -> None:
    """End workers whose pool has gone."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.end()
