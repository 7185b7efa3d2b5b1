"""The decoder process: decodes files for a server, so that a crash of a decoder does not affect the server.

Its standard input is a socket, from which it reads orders and to which it writes replies. While it decodes, a signal
kills it once it has used its CPU time or the server has closed the socket. Its memory is limited by RLIMIT_AS. Output
to stdout and stderr, for example by libtiff, is discarded. It imports neither torch nor the caller's modules.
"""

import contextlib
import fcntl
import gc
import importlib
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import Internal, ResourceExhausted, SidelightError
from .pixels import Pixels, TooManyPixels
from .preprocessing import Geometry, Preprocessing

READY = b"+"  # the first byte that a worker sends, once it can take orders
HEAD = struct.Struct("!II")  # an order: sizes of the pickled `Order` and of the file, which both follow
REPLY = struct.Struct("!B?III")  # a `Reply`: status, whether the worker exits after it, sizes; its body follows

OK = 0
NEEDS_MORE = 100  # in place of a status code: the file takes more pixels or memory than the order allows
MAX_MESSAGE_BYTES = 16 * 1024  # limit of a reply without pixels

BYTES_PER_PIXEL = 12  # memory while decoding: a progressive CMYK JPEG takes 8 for coefficients and Pillow 4
SPARE_BYTES = 64 * 1024 * 1024  # memory for decoders of any image, and for a resized image (`MAX_SCALED_PIXELS`)
MAX_KEPT_BYTES = 32 * 1024 * 1024  # memory that a worker may keep between files; above it, it has leaked and exits


@dataclass(frozen=True, slots=True)
class Order:
    """How to decode a file for a model, with its limits."""

    preprocessing: Preprocessing
    max_pixels: int
    max_s: float  # of CPU time
    may_need_more: bool = False  # whether the server may order the file again, with a higher limit

    @property
    def max_bytes(self) -> int:
        """Memory that decoding may take beyond the process and the file."""
        return BYTES_PER_PIXEL * self.max_pixels + SPARE_BYTES

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.preprocessing.height, self.preprocessing.width, self.preprocessing.channels

    def geometry(self, height: int, width: int) -> Geometry | None:
        return self.preprocessing.geometry(height, width)

    def decode(self, file: bytes) -> tuple[Pixels, tuple[int, int]]:
        """Return the pixels of the model's input, and height and width of the image."""
        from .decoding import decode

        channels, window = self.preprocessing.channels, self.preprocessing.window
        pixels = decode(file, channels=channels, max_pixels=self.max_pixels, window=window)  # [H, W, C]
        return self.preprocessing.fit(pixels)[0], (pixels.shape[0], pixels.shape[1])


@dataclass(frozen=True, slots=True)
class PictureOrder(Order):
    """How to decode a file as an RGB picture to be shown: the part of it in `box`, in another height and width.

    `box` has the part's left, top, right and bottom edges in pixels; None is the whole picture.
    """

    size: tuple[int, int] = field(kw_only=True)
    box: tuple[float, float, float, float] | None = field(kw_only=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.size, 3

    def geometry(self, height: int, width: int) -> Geometry | None:
        return None

    def decode(self, file: bytes) -> tuple[Pixels, tuple[int, int]]:
        from .decoding import decode

        pixels = decode(file, channels=3, max_pixels=self.max_pixels, window=self.preprocessing.window)  # [H, W, 3]
        height, width = pixels.shape[:2]
        if self.box is None and self.size == (height, width):
            return pixels, self.size
        shown = Image.fromarray(pixels).resize(self.size[::-1], Image.Resampling.BILINEAR, self.box)
        return np.asarray(shown), (height, width)


@dataclass(frozen=True, slots=True)
class Reply:
    """The result for a file: the pixels that were ordered, or a canonical status code and a message in UTF-8.

    For INTERNAL the message is a traceback. The status may also be `NEEDS_MORE`.
    """

    status: int
    height: int  # of the original image
    width: int
    body: bytes | memoryview


def main() -> None:
    """Decode files until the server closes the socket."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # only the server ends its workers
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGPROF, signal.SIGIO):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core dump with a caller's image
    with contextlib.suppress(OSError):  # the OOM killer should choose a worker before the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    from .decoding import lift_pillows_limit  # imported here, because the server imports this module only for `Order`
    from .dicom import is_dicom

    lift_pillows_limit()
    gc.freeze()
    with socket.socket(fileno=sys.stdin.fileno()) as server:
        silence()
        server.sendall(READY)
        base_bytes, has_pydicom = _address_space(), False
        with server.makefile("rb") as orders:
            while head := orders.read(HEAD.size):
                n_order, n_file = HEAD.unpack(head)
                order: Order = pickle.loads(orders.read(n_order))  # noqa: S301  (sent by the server)
                file = orders.read(n_file)
                if is_dicom(file) and not has_pydicom:
                    has_pydicom, before_bytes = True, _address_space()
                    with contextlib.suppress(ImportError):
                        importlib.import_module("pydicom.pixels")
                    base_bytes += _address_space() - before_bytes  # pydicom's memory, not the file's
                _bound_memory(base_bytes, order, n_file)
                with _bounded(server, order.max_s):
                    reply = _decode(file, order)
                del file
                if reply.status != OK:
                    gc.collect()  # tracebacks keep images alive
                is_last = _address_space() > base_bytes + len(reply.body) + MAX_KEPT_BYTES
                server.sendall(REPLY.pack(reply.status, is_last, reply.height, reply.width, len(reply.body)))
                server.sendall(reply.body)
                if is_last:
                    return


def silence() -> None:
    """Discard all further output to stdout and stderr, including that of C libraries."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    os.close(null)


def _decode(file: bytes, order: Order) -> Reply:
    try:
        pixels, (height, width) = order.decode(file)
        return Reply(OK, height, width, np.ascontiguousarray(pixels).reshape(-1).data)
    except TooManyPixels as error:
        return _failure(NEEDS_MORE if order.may_need_more else error.code, error.message)
    except SidelightError as error:
        return _failure(error.code, error.message)
    except MemoryError:
        if order.may_need_more:
            return _failure(NEEDS_MORE, "")
        limit = f"{order.max_bytes / 2**20:,.0f} MiB"
        return _failure(
            ResourceExhausted.code,
            f"image file: it takes more than the {limit} that decoding may take here ({BYTES_PER_PIXEL} bytes for each "
            "of max_image_pixels, and some); send a smaller picture, or an array",
        )
    except Exception:  # a bug: the process must answer and go on; the server logs the traceback
        return _failure(Internal.code, traceback.format_exc())


def _failure(status: int, message: str) -> Reply:
    return Reply(status, 0, 0, message.encode(errors="replace")[-MAX_MESSAGE_BYTES:])


def _address_space() -> int:
    """Return the size of this process's address space in bytes; 0 if unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _bound_memory(base_bytes: int, order: Order, n_file: int) -> None:
    if base_bytes:
        limit = base_bytes + n_file + order.max_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextlib.contextmanager
def _bounded(server: socket.socket, max_s: float) -> Iterator[None]:
    """Kill this process after `max_s` seconds of CPU time, or when the server closes the socket.

    Both use signals whose default action ends the process, whatever its native code does. SIGIO works on Linux only.
    """
    flags = fcntl.fcntl(server, fcntl.F_GETFL)
    fcntl.fcntl(server, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(server, fcntl.F_SETFL, flags | os.O_ASYNC)
    signal.setitimer(signal.ITIMER_PROF, max_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        fcntl.fcntl(server, fcntl.F_SETFL, flags)  # sending the reply would raise SIGIO too
