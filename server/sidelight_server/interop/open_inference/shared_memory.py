"""Triton's system shared memory: regions that a caller registers by name, for its later calls.

A region is dropped by Unregister, when the connection that registered it closes, or when its file is deleted. Its
descriptor is closed once no request in flight uses it.
"""

import asyncio
import contextlib
import os
import weakref
from dataclasses import dataclass, replace

from ...errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, did_you_mean
from ...rpc.shared_memory import Region, SharedMemory, to_thread_uncancelled
from . import inference_pb2 as oip
from .connections import connected_peers, peer_of

SWEEP_S = 1.0  # between two checks for closed connections and deleted files


@dataclass(frozen=True, slots=True)
class Registered:
    """A region under its caller's name, with the key that names its file."""

    region: Region
    key: str
    peer: str  # whose connection registered it

    def status(self) -> oip.SystemSharedMemoryStatusResponse.RegionStatus:
        return oip.SystemSharedMemoryStatusResponse.RegionStatus(
            name=self.region.name, key=self.key, offset=self.region.start, byte_size=self.region.n_bytes
        )


class CallerRegions:
    """The regions of one caller, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Registered] = {}

    def find(self, name: str, *, field: str) -> Region:
        """Return a region. Raises `NotFound`, which suggests similar names."""
        if name not in self.by_name:
            raise NotFound(f'{field}: region "{name[:64]}" is not registered; {did_you_mean(name, self.by_name)}')
        return self.by_name[name].region


class SystemSharedMemory:
    """The registered regions of all callers. Used on the event loop only.

    Callers see their own regions: with tokens or client certificates those of all their connections, otherwise those
    of the one connection.
    """

    def __init__(self, shared: SharedMemory | None) -> None:
        """`shared` is None if the operator does not allow shared memory."""
        self._shared = shared
        self._callers: dict[str, CallerRegions] = {}

    @property
    def is_allowed(self) -> bool:
        """Whether the operator allows shared memory."""
        return self._shared is not None

    def of(self, caller: str) -> CallerRegions:
        return self._callers.get(caller) or CallerRegions()

    async def register(self, caller: str, peer: str, *, name: str, key: str, offset: int, n_bytes: int) -> None:
        """Open `n_bytes` of a file from `offset` as a region. Raises `SidelightError`, which names the field."""
        shared = self._allowed()
        self._check(shared, caller, name, offset, n_bytes)
        region = await to_thread_uncancelled(_open, shared, name, key, offset, n_bytes)
        self._check(shared, caller, name, offset, n_bytes)  # again: another call may have registered it meanwhile
        self._callers.setdefault(caller, CallerRegions()).by_name[name] = Registered(region, key, peer)

    def unregister(self, caller: str, name: str) -> None:
        """Drop a region of a caller, or all of them if the name is empty. An unknown name is not an error."""
        self._allowed()
        if not name:
            self._callers.pop(caller, None)
        elif regions := self._callers.get(caller):
            regions.by_name.pop(name, None)
            self._drop_empty()

    async def sweep_forever(self) -> None:
        """Drop regions whose connection is closed or whose file is deleted, every `SWEEP_S` seconds."""
        while True:
            await asyncio.sleep(SWEEP_S)
            if self._callers:
                with contextlib.suppress(OSError):
                    await self.sweep()

    async def sweep(self) -> None:
        """Drop regions whose connection is closed or whose file is deleted."""
        peers = await asyncio.to_thread(connected_peers)
        for regions in self._callers.values():
            for name, each in list(regions.by_name.items()):
                peer = peer_of(each.peer)
                is_disconnected = peer is not None and peers is not None and peer not in peers
                if is_disconnected or not os.fstat(each.region.file).st_nlink:
                    del regions.by_name[name]
        self._drop_empty()

    def close(self) -> None:
        self._callers.clear()

    def _drop_empty(self) -> None:
        self._callers = {caller: regions for caller, regions in self._callers.items() if regions.by_name}

    def _allowed(self) -> SharedMemory:
        if self._shared is None:
            raise FailedPrecondition(
                "system shared memory: this server's operator has not allowed it (the setting shared_memory)"
            )
        return self._shared

    def _check(self, shared: SharedMemory, caller: str, name: str, offset: int, n_bytes: int) -> None:
        regions = self.of(caller).by_name
        if not name:
            raise InvalidArgument("name: empty, expected one for the region")
        if n_bytes < 1:
            raise InvalidArgument(f"byte_size: {n_bytes}, expected at least 1")
        if n_bytes > shared.max_region_bytes or offset >= 2**62:
            raise ResourceExhausted(
                f"byte_size: {n_bytes} from offset {offset}, the server's max_region_bytes is {shared.max_region_bytes}"
            )
        if name in regions:
            raise InvalidArgument(f'name: a region "{name[:64]}" is registered already; unregister it first')
        if len(regions) >= shared.max_stream_regions:
            raise ResourceExhausted(
                f"name: {len(regions)} regions are registered, the server's max_stream_regions is "
                f"{shared.max_stream_regions}"
            )


def _open(shared: SharedMemory, name: str, key: str, offset: int, n_bytes: int) -> Region:
    # `shm_open` ignores leading slashes. `multiprocessing.SharedMemory` leaves pages unallocated until they are
    # written; `pwritev` reports it if memory is full then.
    opened = shared.open(key.lstrip("/"), offset + n_bytes, may_be_sparse=True)
    region = replace(opened, name=name, n_bytes=n_bytes, start=offset)
    # `unregister` does not close it: a request in flight may still be reading or writing it in a thread.
    weakref.finalize(region, os.close, region.file)
    return region
