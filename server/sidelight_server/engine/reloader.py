"""The reloader: watches the models' files, and has a model loaded again once one of its files has changed."""

import asyncio
import contextlib

from ..errors import SidelightError
from .registry import Entry, Fingerprint, Registry, in_thread


class Reloader:
    """Looks at the files of every model that serves: at number, size and time alone, which any file system tells.

    Each model has a task of its own, so one whose file system or factory hangs holds up no other.
    """

    def __init__(self, registry: Registry, *, every_s: float) -> None:
        self._registry = registry
        self._every_s = every_s
        self._changed: dict[str, Fingerprint] = {}
        self._looking: dict[str, asyncio.Task[None]] = {}  # by model

    async def run(self) -> None:
        """Look, again and again, until cancelled."""
        try:
            while True:
                await asyncio.sleep(self._every_s)
                self._begin()
        finally:
            for task in self._looking.values():
                task.cancel()

    async def look(self) -> None:
        """Look once, and wait for what comes of it. `run` does not wait."""
        if begun := self._begin():
            await asyncio.wait(begun)

    def _begin(self) -> list[asyncio.Task[None]]:
        """Look at every model that serves, unless the last look at it goes on. Returns what was begun."""
        begun = []
        for entry in self._registry.entries.values():
            if not entry.models or not entry.has_source or entry.name in self._looking:
                continue
            task = self._looking[entry.name] = asyncio.create_task(self._look(entry))
            task.add_done_callback(lambda _, name=entry.name: self._looking.pop(name))  # type: ignore[misc]
            begun.append(task)
        return begun

    async def _look(self, entry: Entry) -> None:
        """Look at one model. What has changed is loaded when the next look finds it at rest: it may be half written.

        A version that fails is not tried again before its files change once more.
        """
        try:
            now = await asyncio.wrap_future(in_thread(entry.fingerprint, name="sidelight-watch"))
        except OSError:  # a folder that is being replaced: the next look finds it whole
            return
        if now == entry.loaded_from:
            self._changed.pop(entry.name, None)
        elif self._changed.get(entry.name) == now:
            with contextlib.suppress(SidelightError):  # the log has it
                await self._registry.reload_in_turn(entry.name)
        else:
            self._changed[entry.name] = now
