"""A decoder process: decodes one file at a time, with bounded time and memory, and ends with the server."""

import logging
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ...domain import Array
from ...errors import Cancelled, FailedPrecondition, Internal, InvalidArgument, ResourceExhausted, SidelightError
from ...inputs.decode_worker import HEAD, MAX_MESSAGE_BYTES, NEEDS_MORE, OK, READY, REPLY, Order
from ...inputs.preprocessing import Geometry
from ...telemetry.logs import Event, Throttle

Fitted = tuple[Array, Geometry | None] | SidelightError

WALL_TIMES = 10  # limit of wall time, as a multiple of the limit of CPU time (max_decode_s)
START_S = 60.0  # limit for a worker's start, which takes 0.2 s on an idle machine
END_S = 1.0  # time that a worker has to exit by itself before it is killed

_BOOT = "import sys; sys.path[:] = sys.argv[1:]; from sidelight_server.inputs.decode_worker import main; main()"
_PARENT = str(Path(__file__).parents[3])
_FAILURES = {each.code: each for each in (InvalidArgument, FailedPrecondition, ResourceExhausted)}
# One thread and one malloc arena, because reserved address space counts toward the memory limit. Freed memory returns
# to the system at once; huge pages make up for it: without them an image of 12 megapixels takes half as long again.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 20),
    "MALLOC_TOP_PAD_": str(8 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}  # fmt: skip


class NeedsMore(ResourceExhausted):
    """A file takes more pixels or memory than an order allows that `may_need_more`."""


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
        """Return a file's pixels, uint8 of `order.shape`, or its error."""
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
            return self._exit_error(order)
        except MemoryError:
            self.kill()  # its reply was not read to the end
            return ResourceExhausted("image file: the server has no memory for its pixels now; send it later")
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
        n_ordered = math.prod(order.shape)
        if n_bytes > MAX_MESSAGE_BYTES and (status != OK or n_bytes != n_ordered):
            raise EOFError
        body = self._receive(n_bytes, until_s)
        if is_last:
            self._has_ended = True
        if status == OK and n_bytes == n_ordered and min(height, width) > 0:
            return np.frombuffer(body, np.uint8).reshape(order.shape), order.geometry(height, width)
        message = body.decode(errors="replace")
        if status == NEEDS_MORE and order.may_need_more:
            return NeedsMore(message)
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

    def _exit_error(self, order: Order) -> SidelightError:
        if self._has_ended:
            return Cancelled("the client has disconnected")
        status = self.end()
        if status == -signal.SIGPROF:
            return InvalidArgument(f"image file: decoding took more than {order.max_s:g} s of CPU time (max_decode_s)")
        name = signal.Signals(-status).name if status < 0 else str(status)
        self._faults.log(logging.WARNING, Event("decoder_died", status=name, was_ready=self._is_ready))
        if not self._is_ready:
            return Internal("image file: the process that decodes it did not start; the server's log has the cause")
        if status == -signal.SIGKILL:
            return ResourceExhausted("image file: the system ended its decoder, as it does if memory is short")
        return InvalidArgument("image file: its decoder crashed on it")
