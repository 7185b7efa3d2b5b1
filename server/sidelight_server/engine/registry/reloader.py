"""The reloader: polls the models' files and reloads a model once one of its files has changed."""

import asyncio
import contextlib

from ...errors import SidelightError
from .entry import Entry, Fingerprint
from .loader import in_thread
from .registry import Registry


class Reloader:
    """Polls the files of every serving model. Compares inode, size and modification time, which any file system has.

    Each model has a task of its own, so a file system or factory that hangs delays no other model.
    """

    def __init__(self, registry: Registry, *, every_s: float) -> None:
        self._registry = registry
        self._every_s = every_s
        self._changed: dict[str, Fingerprint] = {}
        self._checking: dict[str, asyncio.Task[None]] = {}  # by model

    async def run(self) -> None:
        """Poll until cancelled."""
        try:
            while True:
                await asyncio.sleep(self._every_s)
                self._begin()
        finally:
            for task in self._checking.values():
                task.cancel()

    async def check(self) -> None:
        """Poll once, and wait for the reloads that follow. `run` does not wait for them."""
        if begun := self._begin():
            await asyncio.wait(begun)

    def _begin(self) -> list[asyncio.Task[None]]:
        """Start a check of every serving model whose last check has ended; return the tasks."""
        begun = []
        for entry in self._registry.entries.values():
            if not entry.models or not entry.has_source or entry.name in self._checking:
                continue
            task = self._checking[entry.name] = asyncio.create_task(self._check(entry))
            task.add_done_callback(lambda _, name=entry.name: self._checking.pop(name))  # type: ignore[misc]
            begun.append(task)
        return begun

    async def _check(self, entry: Entry) -> None:
        """Check one model. Changed files are loaded only once a second check finds the same: they may be half written.

        A version that fails to load is not retried before its files change again.
        """
        try:
            now = await asyncio.wrap_future(in_thread(entry.fingerprint, name="sidelight-watch"))
        except OSError:  # a folder that is being replaced: the next check reads it
            return
        if now == entry.loaded_from:
            self._changed.pop(entry.name, None)
        elif self._changed.get(entry.name) == now:
            with contextlib.suppress(SidelightError):  # the registry has logged it
                await self._registry.reload_in_turn(entry.name)
        else:
            self._changed[entry.name] = now
