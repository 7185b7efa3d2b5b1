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

import torch

from ..config.model_settings import SOURCES, ModelSettings
from ..config.settings import Settings
from ..config.spec import ModelSpec
from ..errors import ConfigurationError, FailedPrecondition, NotFound, Unavailable, did_you_mean
from ..models.calibration import can_grow
from ..models.model import Model
from ..models.trial_run import InTurn, at_once
from ..models.warmup import limit, measure_again, warm_up
from ..telemetry.logs import Event
from .device import Device
from .model_entry import Entry, Version

log = logging.getLogger("sidelight")

PATIENCE_S = 60.0  # a background reload that takes longer no longer blocks the next one
RETRY_S = 10.0  # after a failed load, requests do not retry it for this long


_Value = TypeVar("_Value")


class Registry:
    """The models of an engine. Each load has its own thread; its passes run on the device's thread, between chunks."""

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
        self._on_change = on_change  # called on the loader's thread when another version serves
        self._n_threads = torch.get_num_threads()
        self._lock = threading.Lock()  # guards `loading` and `waiting` of the entries
        self._reloading = asyncio.Lock()  # held by background reloads: by the reloader or a signal
        self._is_closed = False
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
                    entry.models = self._versions(entry, 1, turns=[at_once] * len(self._devices))
                entry.name = entry.models[0].name
            if entry.name in entries:
                raise ConfigurationError(f'name: two models are called "{entry.name}"')
            entries[entry.name] = entry
        self.entries, self.is_loaded = entries, True

    async def loaded(self) -> None:
        """Run `load` in a thread, unless it has completed."""
        if not self.is_loaded:
            await asyncio.shield(asyncio.wrap_future(self._submit(self.load, threading.Lock())))

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
            raise FailedPrecondition(f'model "{entry.name}" was handed over as a module: there is no source to load')
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
        """Measure the chunk size of each model again, in turns with the requests."""
        for entry in list(self.entries.values()):
            if any(map(can_grow, entry.models)):
                measuring = self._submit(functools.partial(self._measure_again, entry), entry.turn)
                with contextlib.suppress(Unavailable):  # the server is shutting down, or a device was lost
                    await asyncio.shield(asyncio.wrap_future(measuring))

    def close(self) -> None:
        """Stop loading: queued loads raise `Unavailable`."""
        self._is_closed = True

    def _start_load(self, entry: Entry) -> "Future[None]":
        """Return the first load of a model: the running one, or a new one."""
        with self._lock:
            if entry.loading is None:
                if entry.failure and time.monotonic() - entry.failed_s < RETRY_S:
                    raise _failed(entry)
                entry.loading = self._submit(lambda: self._load_first(entry), entry.turn)
            return entry.loading

    def _start_reload(self, entry: Entry) -> "Future[None]":
        """Return the queued reload, which will read the files when it starts, or queue a new one."""

        def load() -> None:
            with self._lock:
                entry.waiting = None
            self._load(entry)

        with self._lock:
            if entry.waiting is None:
                entry.waiting = self._submit(load, entry.turn)
            return entry.waiting

    def _submit(self, load: Callable[[], None], turn: threading.Lock) -> "Future[None]":
        def run() -> None:
            with turn:
                if self._is_closed:
                    raise Unavailable("the server is shutting down")
                load()

        return in_thread(run, name="sidelight-load")

    def _load_first(self, entry: Entry) -> None:
        try:
            if not entry.models:
                self._load(entry)
        except FailedPrecondition:
            raise _failed(entry) from None
        finally:
            with self._lock:
                entry.loading = None

    def _load(self, entry: Entry) -> None:
        """Load a version and make it the serving one. Runs on the loader's thread."""
        began, before = time.monotonic(), entry.models
        failure = None
        try:
            entry.models = self._loaded(entry, before)
        except BaseException as error:  # a source or a model may raise anything
            failure = str(error) if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {error}"
        # Outside the except clause, so that no traceback keeps a half-loaded model alive.
        if failure is not None:
            if self._is_closed:
                raise Unavailable("the server is shutting down")
            entry.failure = " ".join(failure.split()).removeprefix(f'model "{entry.name}": ')
            entry.failed_s = time.monotonic()
            entry.n_failed += 1
            log.error(Event("load_failed", model=entry.name, message=entry.failure))
            raise FailedPrecondition(f'model "{entry.name}": {entry.failure}')
        entry.failure = ""
        log.info(loaded_event(entry.models[0], seconds=round(time.monotonic() - began, 1)))
        self._on_change()

    def _loaded(self, entry: Entry, before: Version) -> Version:
        with self._one_thread():
            version = before[0].version + 1 if before else 1
            models = self._versions(entry, version, turns=[device.in_turn for device in self._devices])
            for device, model in zip(self._devices, models, strict=True):
                warm_up(model, before=before[device.index] if before else None)
                model.in_turn = at_once
        return models

    def _measure_again(self, entry: Entry) -> None:
        """Measure the chunk size on each device. Runs on a thread of its own, like a load."""
        with self._one_thread():
            for device, model in zip(self._devices, entry.models, strict=True):
                model.in_turn = device.in_turn
                try:
                    measure_again(model)
                except Unavailable:
                    raise
                except Exception as error:  # for example a lack of memory; the size stays
                    log.warning(Event("measuring_failed", model=entry.name), exc_info=error)
                finally:
                    model.in_turn = at_once

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        """Keep torch from starting OpenMP threads for this thread: they slow down the device's, see `app.server`."""
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._n_threads)  # applies to threads that start later

    def _versions(self, entry: Entry, version: int, *, turns: Sequence[InTurn]) -> Version:
        entry.loaded_from = entry.fingerprint()
        spec = entry.spec()
        models = tuple(
            Model(
                spec,
                device=device.torch_device,
                settings=entry.settings,
                version=version,
                in_turn=turn,
                is_shared=not entry.has_source,
            )
            for device, turn in zip(self._devices, turns, strict=True)
        )
        for model in models:
            limit(model)
        _ = models[0].digest  # computed here, not with the first answer
        return models


def in_thread(run: Callable[[], _Value], *, name: str) -> "Future[_Value]":
    """Run a function in a new daemon thread, so that a hanging function does not keep the process from exiting."""
    future: Future[_Value] = Future()
    future.set_running_or_notify_cancel()  # several callers may wait for it, so it cannot be cancelled

    def set_result() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=set_result, name=name, daemon=True).start()
    return future


def loaded_event(model: Model, **more: object) -> Event:
    """Return the log event of a loaded model, with its detected properties."""
    return Event(
        "loaded",
        model=model.name,
        version=model.version,
        digest=model.digest[:12],
        call=model.adapter.summary,
        outputs=model.head.outputs if model.is_known else "unknown",
        activation=model.head.activation if model.is_known else "unknown",
        classes=model.class_count or "unknown",
        chunk_rows=model.chunk_rows,
        **more,
    )


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
        raise ConfigurationError(f"{where}: not set; say --model python:mine:resnet, or another of {SOURCES}")
    entry = Entry(offered.name or "", offered)
    if offered.load == "lazy":
        if not offered.name:
            raise ConfigurationError("load: lazy, but the model has no name that requests could ask for; set name")
        # Report a missing file at start, not with the first request.
        with _naming(entry.name if entry.name in settings.models else ""):
            for path in entry.files():
                if not path.exists():
                    raise ConfigurationError(f"{path} is not there")
    return entry


def _failed(entry: Entry) -> FailedPrecondition:
    # Without the cause: callers must not learn the operator's paths.
    return FailedPrecondition(f'model "{entry.name}" could not be loaded; the server\'s log has the cause')
