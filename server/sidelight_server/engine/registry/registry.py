"""The model registry: loads models at start, on the first request or on reload, and holds the serving versions."""

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from ...config.model_settings import SOURCES, ModelSettings
from ...config.settings import Settings
from ...config.spec import ModelSpec
from ...errors import ConfigurationError, FailedPrecondition, NotFound, Unavailable, did_you_mean
from ...models.calibration import can_grow
from ...models.model import Model
from ...models.trial.in_turn import at_once
from ...models.warmup import warm_up
from ..devices.device import Device
from .entry import Entry, Version
from .loader import Loader

log = logging.getLogger("sidelight")

PATIENCE_S = 60.0  # a background reload that takes longer no longer blocks the next one
RETRY_S = 10.0  # after a failed load, requests do not retry it for this long

_Value = TypeVar("_Value")


class Registry:
    """The models of an engine. Each load has its own thread; its passes run on the device's thread, between chunks.

    Loads are begun by one thread at a time: the event loop.
    """

    def __init__(
        self,
        offered: Sequence[ModelSpec | ModelSettings],
        settings: Settings,
        devices: Sequence[Device],
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._devices = devices
        self._loader = Loader(devices, on_change=on_change)
        self._reloading = asyncio.Lock()  # held by background reloads: by the reloader or a signal
        self._offered = [_entry(each, settings) for each in offered]
        self.is_loaded = False  # whether `load` has completed
        self.entries: dict[str, Entry] = {entry.name: entry for entry in self._offered if entry.name}

    def load(self) -> None:
        """Load all models that are not lazy, one after the other, before the worker threads start.

        Raises `ConfigurationError`.
        """
        entries: dict[str, Entry] = {}
        for entry in self._offered:
            if entry.settings.load == "eager" or not entry.has_source:
                with _naming(entry.name if entry.name in self._settings.models else ""):
                    entry.models = self._loader.build(entry, 1, turns=[at_once] * len(self._devices))
                entry.name = entry.models[0].name
            if entry.name in entries:
                raise ConfigurationError(f'name: two models are called "{entry.name}"')
            entries[entry.name] = entry
        self.entries, self.is_loaded = entries, True

    async def ensure_loaded(self) -> None:
        """Run `load` in a thread, unless it has completed."""
        if not self.is_loaded:
            await asyncio.shield(asyncio.wrap_future(self._loader.submit(self.load, threading.Lock())))

    def find(self, name: str) -> Entry:
        """Return the entry of a model; empty means the first. Raises `NotFound`, which suggests similar names."""
        try:
            return self.entries[name or next(iter(self.entries))]
        except KeyError:
            raise NotFound(f'model: there is no "{name}"; {did_you_mean(name, self.entries)}') from None

    def serving(self, name: str) -> Version:
        """Return the serving version. Raises `Unavailable` if none is loaded; `ready` loads it."""
        entry = self.find(name)
        if not entry.models:
            raise Unavailable(f'model "{entry.name}" is not loaded yet')
        return entry.models

    async def ready(self, name: str) -> Version:
        """Return the serving version, loading it first if necessary. Raises `FailedPrecondition` if that fails."""
        entry = self.find(name)
        if not entry.models:
            # Shielded: other requests may wait for the same load, and the model stays loaded.
            await asyncio.shield(asyncio.wrap_future(self._start_load(entry)))
        return entry.models

    async def reload(self, name: str) -> Entry:
        """Load a new version of a model from its source while the old one serves, then replace it.

        Raises `FailedPrecondition` if the new version cannot be loaded; the old one continues to serve.
        """
        entry = self.find(name)
        if not entry.has_source:
            raise FailedPrecondition(f'model "{entry.name}" was passed as a module: there is no source to load')
        await asyncio.shield(asyncio.wrap_future(self._start_reload(entry)))
        return entry

    async def reload_all(self) -> None:
        """Reload every serving model that has a source. Failures are logged; the old versions continue to serve."""
        loaded = [entry.name for entry in self.entries.values() if entry.models and entry.has_source]
        await asyncio.gather(*map(self.reload_in_turn, loaded), return_exceptions=True)

    async def reload_in_turn(self, name: str) -> None:
        """As `reload`, but one at a time: two new versions at once may take more memory than there is.

        A reload that takes longer than `PATIENCE_S` may hang, so it no longer blocks the next one.
        """
        async with self._reloading:
            reload = asyncio.create_task(self.reload(name))
            try:
                await asyncio.wait([reload], timeout=PATIENCE_S)
            except asyncio.CancelledError:
                reload.cancel()
                raise
        await reload

    def warm_up(self, device: Device) -> list[Model]:
        """Warm up all loaded models on one device; return them. Runs on the device's thread."""
        loaded = [entry for entry in self.entries.values() if entry.models]
        for entry in loaded:
            warm_up(entry.models[device.index])
        return [entry.models[device.index] for entry in loaded]

    async def measure_again(self) -> None:
        """Measure the chunk size of each model again, while its device is idle."""
        for entry in list(self.entries.values()):
            if any(map(can_grow, entry.models)):
                measuring = self._loader.submit(functools.partial(self._loader.measure_again, entry), entry.turn)
                with contextlib.suppress(Unavailable):  # the server is shutting down, or a device was lost
                    await asyncio.shield(asyncio.wrap_future(measuring))

    def close(self) -> None:
        """Stop loading: queued loads raise `Unavailable`."""
        self._loader.close()

    def _start_load(self, entry: Entry) -> "Future[None]":
        """Return the first load of a model: the unfinished one, or a new one."""
        if not entry.is_loading:
            if entry.failure and time.monotonic() - entry.failed_s < RETRY_S:
                raise _failed(entry)
            entry.loading = self._loader.submit(lambda: self._load_first(entry), entry.turn)
        assert entry.loading  # noqa: S101
        return entry.loading

    def _start_reload(self, entry: Entry) -> "Future[None]":
        """Return the reload that has not started, which will read the files when it does, or queue a new one."""
        if entry.reloading is None or entry.reloading.running() or entry.reloading.done():
            entry.reloading = self._loader.submit(lambda: self._loader.load(entry), entry.turn)
        return entry.reloading

    def _load_first(self, entry: Entry) -> None:
        try:
            if not entry.models:
                self._loader.load(entry)
        except FailedPrecondition:
            raise _failed(entry) from None


@contextlib.contextmanager
def _naming(table: str) -> Iterator[None]:
    """Prefix a `ConfigurationError` with the model's settings table."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"models.{table}: {error}" if table else str(error)) from None


def _entry(offered: ModelSpec | ModelSettings, settings: Settings) -> Entry:
    if isinstance(offered, ModelSpec):
        return Entry(offered.name or "", settings.of_model(offered.name or ""), offered)
    if not offered.model:
        where = f"models.{offered.name}.model" if offered.name in settings.models else "model"
        raise ConfigurationError(f"{where}: not set; for example --model python:mine:resnet; expected {SOURCES}")
    entry = Entry(offered.name or "", offered)
    if offered.load == "lazy":
        if not offered.name:
            raise ConfigurationError("load: lazy, but the model has no name, which requests need; set name")
        # Report a missing file at start, not with the first request.
        with _naming(entry.name if entry.name in settings.models else ""):
            for path in entry.files():
                if not path.exists():
                    raise ConfigurationError(f"{path} does not exist")
    return entry


def _failed(entry: Entry) -> FailedPrecondition:
    # Without the cause: callers must not learn the operator's paths.
    return FailedPrecondition(f'model "{entry.name}" could not be loaded; the server\'s log has the cause')
