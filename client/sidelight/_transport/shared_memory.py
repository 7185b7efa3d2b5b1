"""Shared memory: passes large arrays to a server on the same machine (Linux).

A region is a file in the directory that the server's operator allows: made, allocated whole, registered on a stream,
and unlinked as soon as the server has it open. So nothing of it remains, whichever side ends in whatever way.

The server reads and writes it by `preadv` and `pwritev` alone: whatever a caller does to the file, it is not killed by
SIGBUS. The client maps its own: nobody but this user can have it open, and the kernel's copies through a file took ten
times as long as a copy in memory (1.2 ms against 0.12 ms for 4.8 MB).
"""

import contextlib
import math
import mmap
import os
import secrets
import sys
from pathlib import Path

import numpy as np

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from .._inputs.tensors import DTYPES, Array, array_of, dtype_of, little_endian
from ..exceptions import Cancelled, FailedPrecondition, ResourceExhausted
from ..results.server_info import ServerInfo
from .allocator import Allocator

MAX_FIRST_BYTES = 256 * 1024 * 1024  # a region of more is made only for a batch that needs it


def directory_of(server: ServerInfo, wanted: bool | str | os.PathLike[str]) -> Path:
    """Return the folder for regions; `wanted` may name it, where this process sees it by another name.

    `FailedPrecondition` says why there is none: nothing goes another way in silence.
    """
    if not sys.platform.startswith("linux"):
        raise FailedPrecondition(f"shared_memory: needs Linux, this is {sys.platform}")
    if server.shared_memory is None:
        raise FailedPrecondition(
            "shared_memory: the server does not allow it; start sidelight-server with --shared-memory DIRECTORY"
        )
    directory = Path(server.shared_memory.directory if isinstance(wanted, bool) else wanted)
    if not directory.is_dir():
        raise FailedPrecondition(
            f"shared_memory: the server's folder is {server.shared_memory.directory}, and there is no {directory} "
            'here; if it has another name here, say connect(…, shared_memory="/that/name")'
        )
    return directory


class Region:
    """One file, and what is taken of it."""

    def __init__(self, directory: Path, size: int) -> None:
        self.name = f"sidelight-{secrets.token_hex(16)}"
        self.size = size
        self.allocator = Allocator(size)
        self.is_registered = False
        self._path = directory / self.name
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(self._path, flags, 0o600)
        try:
            # All of it now: a write into a hole could fail later, when the memory is gone.
            os.posix_fallocate(file, 0, size)
            self._bytes: mmap.mmap | None = mmap.mmap(file, size)
        except OSError as error:
            self.unlink()
            raise ResourceExhausted(f"shared_memory: {size} bytes in {directory}: {error.strerror}") from None
        finally:
            os.close(file)

    def unlink(self) -> None:
        """Take the file's name away. Who has it open goes on."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()

    def write(self, array: Array, offset: int) -> None:
        """Write an array's bytes."""
        self._mapped()[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)

    def read(self, n_bytes: int, offset: int) -> Array:
        """Return a copy of bytes."""
        return self._mapped()[offset : offset + n_bytes].copy()

    def close(self) -> None:
        """Let go of it. Who reads or writes just now goes on: the memory is freed with the last view on it."""
        self.unlink()
        self._bytes = None

    def _mapped(self) -> Array:
        mapped = self._bytes
        if mapped is None:
            raise Cancelled("shared_memory: the call that it belonged to has ended")
        return np.frombuffer(mapped, np.uint8)


class Regions:
    """The regions of one call of a stream, and which part of it holds what. Not thread-safe: the stream has a lock."""

    def __init__(self, directory: Path, *, max_region_bytes: int, n_slots: int) -> None:
        self._directory = directory
        self._max_region_bytes = max_region_bytes
        self._n_slots = n_slots
        self._regions: list[Region] = []
        self._held: dict[str, tuple[Region, int]] = {}  # where the bytes of each part begin
        self._missing = 0

    @property
    def is_missing(self) -> bool:
        """Whether a part waits for a region that has not been asked for."""
        return self._missing > 0

    def allocate(self, id_: str, n_bytes: int) -> bool:
        """Take room for a part. False where there is none now; then one may be missing."""
        for region in self._regions:
            if region.is_registered and (offset := region.allocator.take(n_bytes)) is not None:
                self._held[id_] = region, offset
                return True
        if all(region.is_registered and region.size < n_bytes for region in self._regions):
            self._missing = n_bytes
        return False

    def make(self) -> pb.AttributeStreamRequest:
        """Make the region that is missing, and return the message that registers it."""
        n_bytes, self._missing = self._missing, 0
        if n_bytes > self._max_region_bytes:
            raise ResourceExhausted(
                f"shared_memory: a batch and its maps take {n_bytes} bytes, the server's max_region_bytes is "
                f"{self._max_region_bytes}: send fewer examples"
            )
        size = max(n_bytes, min(n_bytes * self._n_slots, MAX_FIRST_BYTES, self._max_region_bytes))
        region = Region(self._directory, size)
        self._regions.append(region)
        return pb.AttributeStreamRequest(
            register_region=pb.RegisterRegionRequest(id=region.name, region=region.name, size_bytes=size)
        )

    def holds(self, name: str) -> bool:
        """Say whether a region is one of these."""
        return any(region.name == name for region in self._regions)

    def mark_registered(self, name: str) -> None:
        """Take note that the server has a region open. From here on the file needs no name."""
        for region in self._regions:
            if region.name == name:
                region.is_registered = True
                region.unlink()

    def write(self, id_: str, array: Array | None, request: pb.AttributeRequest) -> None:
        """Write a part's array, [N, …], into its place, and let the request say where it and the maps are to be.

        Files travel inside the request as ever, and only the maps through the region.
        """
        region, offset = self._held[id_]
        if array is not None:
            region.write(little_endian(array), offset)
            request.images.shared.region = region.name
            request.images.shared.offset_bytes = offset
            request.images.shared.dtype = DTYPES[array.dtype.name]
            request.images.shared.shape.extend(array.shape)
            offset += array.nbytes
        request.output.region.region = region.name
        request.output.region.offset_bytes = offset

    def has(self, id_: str) -> bool:
        """Say whether a part has its place here."""
        return id_ in self._held

    def read(self, id_: str, maps: tensor_pb2.Tensor, *, skip: int) -> Array:
        """Return the maps that the server wrote behind the `skip` bytes of a part's images."""
        region, offset = self._held[id_]
        n_bytes = math.prod(maps.shape) * dtype_of(maps).itemsize
        return array_of(maps, region.read(n_bytes, offset + skip).data)

    def free(self, id_: str) -> None:
        """Give a part's room back."""
        region, offset = self._held.pop(id_, (None, 0))
        if region is not None:
            region.allocator.free(offset)

    def close(self) -> None:
        """Let go of all."""
        for region in self._regions:
            region.close()
        self._regions.clear()
        self._held.clear()
