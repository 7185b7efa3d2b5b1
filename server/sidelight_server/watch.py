"""The watch: looks at the models' files, and has a model loaded again once one of its files has changed."""

import asyncio
import contextlib

from .errors import SidelightError
from .registry import Fingerprint, Registry


class Watch:
    """Looks at the files of every model that serves: at number, size and time alone, which any file system tells."""

    def __init__(self, registry: Registry, *, every_s: float) -> None:
        self._registry = registry
        self._every_s = every_s
        self._changed: dict[str, Fingerprint] = {}

    async def run(self) -> None:
        """Look, again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.look()

    async def look(self) -> None:
        """Look once. What has changed is loaded when the next look finds it at rest: it may be half written.

        A version that fails is not tried again before its files change once more.
        """
        for entry in list(self._registry.entries.values()):
            if not entry.models or not entry.has_source:
                continue
            try:
                now = await asyncio.to_thread(entry.fingerprint)
            except OSError:  # a folder that is being replaced: the next look finds it whole
                continue
            if now == entry.loaded_from:
                self._changed.pop(entry.name, None)
            elif self._changed.get(entry.name) == now:
                with contextlib.suppress(SidelightError):  # the log has it
                    await self._registry.reload(entry.name)
            else:
                self._changed[entry.name] = now
