"""Shared memory regions of a stream: regular files in the operator's folder, read and written but never mapped.

Access to a mapped file that was truncated kills the process (SIGBUS); `preadv` and `pwritev` return a short count
instead, which fails one batch. These calls block, so they run in worker threads.
"""

import asyncio
import errno
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from ..errors import (
    ConfigurationError,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    SidelightError,
    did_you_mean,
)

MAX_NAME_BYTES = 255  # the limit of file systems
BLOCK = 512  # the unit of st_blocks, whatever the file system's block size

# O_NONBLOCK: do not wait for the other end of a FIFO. O_NOCTTY: a terminal must not become the controlling one.
_FLAGS = os.O_RDWR | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0) | os.O_NONBLOCK | os.O_NOCTTY

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Region:
    """A caller's file, opened."""

    name: str
    file: int
    n_bytes: int
    start: int = 0  # where it begins in the file


class RegionLookup(Protocol):
    """Finds regions by name."""

    def find(self, name: str, *, field: str) -> Region:
        """Return a region by its name. Raises `NotFound`."""


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a region that an array is read from or written to. `field` names the request's field in errors."""

    region: Region
    offset: int
    n_bytes: int
    field: str

    def read(self) -> memoryview:
        """Return a copy of the bytes. Raises `DataLoss` if the file was truncated."""
        data = np.empty(self.n_bytes, np.uint8).data  # unlike a bytearray, not zeroed first
        self._move(os.preadv, data)
        return data

    def write(self, data: memoryview) -> None:
        """Write the bytes. Raises `DataLoss` if the file was truncated; the file is never extended."""
        if self._file_bytes() < self.region.start + self.offset + self.n_bytes:
            raise self._cut_short()
        self._move(os.pwritev, data)

    def _move(self, move: Callable[[int, list[memoryview], int], int], data: memoryview) -> None:
        left, at = data, self.region.start + self.offset
        while left:
            try:
                n_moved = move(self.region.file, [left], at)
            except OSError as error:
                raise DataLoss(f"{self._label}: {os.strerror(error.errno or errno.EIO)}") from error
            if not n_moved:
                raise self._cut_short()
            left, at = left[n_moved:], at + n_moved

    def _cut_short(self) -> DataLoss:
        return DataLoss(
            f"{self._label}: its file of {self._file_bytes()} bytes was cut short, "
            f"{self.region.start + self.offset + self.n_bytes} are needed"
        )

    def _file_bytes(self) -> int:
        return os.fstat(self.region.file).st_size

    @property
    def _label(self) -> str:
        return f'{self.field}: region "{self.region.name}"'


class SharedMemory:
    """The folder that the operator allows for regions. Raises `ConfigurationError` if it cannot be opened."""

    def __init__(self, folder: Path, *, max_region_bytes: int, max_stream_regions: int) -> None:
        if sys.platform != "linux":
            raise ConfigurationError("shared_memory: supported on Linux only; leave it unset")
        try:
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigurationError(f"shared_memory: {folder}: {error.strerror}") from error
        self.path = folder.absolute()
        self.max_region_bytes = max_region_bytes
        self.max_stream_regions = max_stream_regions

    def close(self) -> None:
        """Close the folder. Regions that streams have open stay open until the streams end."""
        os.close(self._folder)

    def open(self, name: str, n_bytes: int, *, may_be_sparse: bool = False) -> Region:
        """Open a caller's file. Raises `SidelightError` if it is missing, no regular file, too short or sparse."""
        _check_name(name)
        file = self._open(name)
        try:
            self._check(name, os.fstat(file), n_bytes, may_be_sparse=may_be_sparse)
        except BaseException:
            os.close(file)
            raise
        return Region(name, file, n_bytes)

    def _open(self, name: str) -> int:
        try:
            return os.open(name.encode(), _FLAGS, dir_fd=self._folder)
        except OSError as error:
            raise self._refusal(name, error.errno or errno.EIO) from error

    def _refusal(self, name: str, number: int) -> SidelightError:
        match number:
            case errno.ENOENT:
                return NotFound(f'region: there is no file "{name}" in {self.path}')
            case errno.EACCES | errno.EPERM | errno.EROFS:
                return PermissionDenied(f'region: the server\'s user may not read and write "{name}" in {self.path}')
            case errno.ELOOP | errno.EISDIR | errno.ENXIO | errno.ENODEV:
                return _not_plain(name)
            case _:
                return FailedPrecondition(f'region: "{name}" cannot be opened: {os.strerror(number)}')

    def _check(self, name: str, status: os.stat_result, n_bytes: int, *, may_be_sparse: bool) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise _not_plain(name)
        if status.st_size < n_bytes:
            raise DataLoss(f'size_bytes: {n_bytes}, but the file of region "{name}" has {status.st_size} bytes')
        if status.st_blocks * BLOCK < n_bytes and not may_be_sparse:
            # Writing maps into a hole may fail because the file system is full.
            raise FailedPrecondition(
                f'size_bytes: {n_bytes}, but of the file of region "{name}" only {status.st_blocks * BLOCK} bytes are '
                "allocated; allocate it whole, as posix_fallocate does"
            )


class Regions:
    """The regions of one stream. `shared` is None if the operator does not allow shared memory.

    Call `close` only once no batch of the stream is in flight.
    """

    def __init__(self, shared: SharedMemory | None) -> None:
        self._shared = shared
        self._open: dict[str, Region] = {}

    async def register(self, name: str, n_bytes: int) -> None:
        """Open a region. Raises `SidelightError` if it cannot be opened or exceeds a limit."""
        if self._shared is None:
            raise FailedPrecondition(
                "register_region: this server's operator has not allowed shared memory (the setting shared_memory)"
            )
        self._check_bounds(self._shared, name, n_bytes)
        await to_thread_uncancelled(self._add, self._shared, name, n_bytes)

    def find(self, name: str, *, field: str) -> Region:
        """Return a region by its name. Raises `NotFound`, which suggests similar names."""
        try:
            return self._open[name]
        except KeyError:
            raise NotFound(
                f'{field}.region: "{name}" is not registered on this stream; {did_you_mean(name, self._open)}'
            ) from None

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1].file)

    def _check_bounds(self, shared: SharedMemory, name: str, n_bytes: int) -> None:
        if n_bytes < 1:
            raise InvalidArgument(f"size_bytes: {n_bytes}, expected at least 1")
        if n_bytes > shared.max_region_bytes:
            raise ResourceExhausted(
                f"size_bytes: {n_bytes}, the server's max_region_bytes is {shared.max_region_bytes}"
            )
        if name in self._open:
            raise InvalidArgument(f'region: "{name}" is registered on this stream already')
        if len(self._open) >= shared.max_stream_regions:
            raise ResourceExhausted(
                f"region: {len(self._open)} are registered, the server's max_stream_regions is "
                f"{shared.max_stream_regions}"
            )

    def _add(self, shared: SharedMemory, name: str, n_bytes: int) -> None:
        # In the worker thread, so that `close` finds the file even if the client disconnects during the open.
        self._open[name] = shared.open(name, n_bytes)


def span(region: Region, offset: int, n_bytes: int, *, field: str) -> Span:
    """Return a part of a region. Raises `InvalidArgument` if it is not within the region."""
    if not 0 <= offset <= region.n_bytes - n_bytes:
        raise InvalidArgument(
            f'{field}.offset_bytes: {offset}, and {n_bytes} bytes from there do not lie within region "{region.name}" '
            f"of {region.n_bytes}"
        )
    return Span(region, offset, n_bytes, field)


async def to_thread_uncancelled(work: Callable[..., _Result], *arguments: object) -> _Result:
    """Run blocking work in a thread, and wait for its end even if this task is cancelled.

    After an answer the client may reuse its region, and after a stream its files are closed: no thread may still be
    reading or writing them then.
    """
    working = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        working.exception()
        raise cancelled
    return working.result()


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
        raise InvalidArgument(
            f"region: got {name[:64]!r}, expected a file's name of at most {MAX_NAME_BYTES} bytes without a separator"
        )


def _not_plain(name: str) -> InvalidArgument:
    return InvalidArgument(f'region: "{name}" is not a regular file')
