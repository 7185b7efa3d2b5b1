"""The registry: which version of which model serves, loaded at start, on the first request, or again."""

import asyncio
import contextlib
import enum
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import torch

from ..config.settings import SOURCES, ModelSettings, Settings
from ..config.spec import ModelSpec
from ..errors import ConfigurationError, FailedPrecondition, NotFound, Unavailable, did_you_mean
from ..models import sources
from ..models.calibration import can_grow
from ..models.model import InTurn, Model, at_once
from ..models.warmup import limit, measure_again, warm_up
from ..telemetry.logs import Event
from .device import Device

log = logging.getLogger("sidelight")

PATIENCE_S = 60.0  # that reloads which nobody waits for wait for each other
RETRY_S = 10.0  # after which a model that could not be loaded is tried again, if somebody asks for it


_Value = TypeVar("_Value")

Version = tuple[Model, ...]  # of one model, one for each device
# Files, their number on the disk, size and time of change in ns: −1 where there is none. The time alone would be the
# same after two writes within one tick of the file system's clock.
Fingerprint = tuple[tuple[Path, int, int, int], ...]


class State(enum.Enum):
    """Whether a model answers."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    SERVING = "serving"
    FAILED = "failed"


class Entry:
    """One model by its name: the version that serves, on each device, and where the next comes from.

    `models` is replaced whole, by the one thread that loads; requests keep the version that they began with.
    """

    def __init__(self, name: str, settings: ModelSettings, spec: ModelSpec | None = None) -> None:
        self.name = name
        self.settings = settings
        self.models: Version = ()  # one for each device; empty: not loaded
        self.loaded_from: Fingerprint = ()  # the files as they were before they were read the last time
        self.failure = ""  # why the last attempt to load it came to nothing
        self.n_failed = 0  # attempts
        self.failed_s = 0.0  # when that was
        self.loading: Future[None] | None = None  # for the first time
        self.waiting: Future[None] | None = None  # a reload that has not begun, for all who ask for one meanwhile
        self._spec = spec  # of a module that was handed over
        self.turn = threading.Lock()  # versions are loaded one after the other; a factory that hangs holds up no other

    @property
    def state(self) -> State:
        """Whether the model answers."""
        if self.models:
            return State.SERVING
        if self.loading:
            return State.LOADING
        return State.FAILED if self.failure else State.UNLOADED

    @property
    def has_source(self) -> bool:
        """Whether the model can be loaded again."""
        return self._spec is None

    def files(self) -> tuple[Path, ...]:
        """Return the files whose change calls for another version."""
        if not self.has_source:
            return ()
        labels = (self.settings.labels,) if self.settings.labels else ()
        return (*sources.files(self.settings.model, self.settings.weights), *labels)

    def fingerprint(self) -> Fingerprint:
        """Return what tells one state of the files from another."""
        return tuple((path, *_stat(path)) for path in self.files())

    def spec(self) -> ModelSpec:
        """Return the whole specification, loaded anew if there is a source. `ConfigurationError` says what is wrong."""
        spec = self._spec or sources.load(self.settings.model, self.settings.weights)
        return spec.completed(self.settings.traits())


class Registry:
    """The models of an engine. Each is loaded in a thread; what that runs on a device waits for its turn there."""

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
        self._on_change = on_change  # another version serves; called on the loader's thread
        self._n_threads = torch.get_num_threads()
        self._lock = threading.Lock()  # over who begins to load
        self._reloading = asyncio.Lock()  # by one who looks at the files, or at a signal
        self._is_closed = False
        self._offered = [_entry(each, settings) for each in offered]
        self.is_loaded = False  # whether `load` has come to its end
        self.entries: dict[str, Entry] = {entry.name: entry for entry in self._offered if entry.name}

    def load(self) -> None:
        """Load what is not lazy, each in turn. Before the threads of the devices begin. `ConfigurationError`."""
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
        """Load in a thread what `load` loads, unless that was done."""
        if not self.is_loaded:
            await asyncio.shield(asyncio.wrap_future(self._submit(self.load, threading.Lock())))

    def find(self, name: str) -> Entry:
        """Return an entry by the model's name; empty means the first. `NotFound` with the near names."""
        try:
            return self.entries[name or next(iter(self.entries))]
        except KeyError:
            raise NotFound(f'model: there is no "{name}"; {did_you_mean(name, self.entries)}') from None

    def serving(self, name: str) -> Version:
        """Return the version that serves. `Unavailable` where none is loaded: see `ready`."""
        entry = self.find(name)
        if not entry.models:
            raise Unavailable(f'model "{entry.name}" is not loaded yet')
        return entry.models

    async def ready(self, name: str) -> Version:
        """Return the version that serves; load one if nobody has. `FailedPrecondition` where that is of no use."""
        entry = self.find(name)
        if not entry.models:
            # Shielded: others may wait for the same, and the model comes to stay.
            await asyncio.shield(asyncio.wrap_future(self._begin(entry)))
        return entry.models

    async def reload(self, name: str) -> Entry:
        """Load a model again from its source, beside the one that serves, and let it take over.

        `FailedPrecondition` says what is wrong with the new one; the old one goes on serving.
        """
        entry = self.find(name)
        if not entry.has_source:
            raise FailedPrecondition(f'model "{entry.name}" was handed over as a module: there is no source to load')
        await asyncio.shield(asyncio.wrap_future(self._begin_again(entry)))
        return entry

    async def reload_all(self) -> None:
        """Load again what serves and has a source. What fails is in the log, and its old version serves on."""
        loaded = [entry.name for entry in self.entries.values() if entry.models and entry.has_source]
        await asyncio.gather(*map(self.reload_in_turn, loaded), return_exceptions=True)

    async def reload_in_turn(self, name: str) -> None:
        """As `reload`, but beside no other that is asked for so: two new versions may take more memory than there is.

        One that takes longer than `PATIENCE_S` may hang, and no longer holds up the others.
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
        """Warm up what was loaded at start, on one device. On the thread that owns it."""
        loaded = [entry for entry in self.entries.values() if entry.models]
        for entry in loaded:
            warm_up(entry.models[device.index])
        return [entry.models[device.index] for entry in loaded]

    async def measure_again(self) -> None:
        """Measure again how many rows a chunk of each model should have, in turn with what callers ask for."""
        for entry in list(self.entries.values()):
            if any(map(can_grow, entry.models)):
                measuring = self._submit(functools.partial(self._measure_again, entry), entry.turn)
                with contextlib.suppress(Unavailable):  # the server is shutting down, or a device was lost
                    await asyncio.shield(asyncio.wrap_future(measuring))

    def close(self) -> None:
        """Load nothing more."""
        self._is_closed = True

    def _begin(self, entry: Entry) -> "Future[None]":
        """Return the loading of a model that is not loaded: the one that runs, or a new one."""
        with self._lock:
            if entry.loading is None:
                if entry.failure and time.monotonic() - entry.failed_s < RETRY_S:
                    raise _failed(entry)
                entry.loading = self._submit(lambda: self._load_first(entry), entry.turn)
            return entry.loading

    def _begin_again(self, entry: Entry) -> "Future[None]":
        """Return the reload that has not begun yet, which will read what is there then, or a new one."""

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
        """Load a version and let it take over. On the loader's thread."""
        began, before = time.monotonic(), entry.models
        failure = None
        try:
            entry.models = self._loaded(entry, before)
        except BaseException as error:  # whatever a source and a model may raise that is not foreseen
            failure = str(error) if isinstance(error, ConfigurationError) else f"{type(error).__name__}: {error}"
        # Past the except clause, where the traceback no longer keeps the half of a model alive.
        if failure is not None:
            if self._is_closed:
                raise Unavailable("the server is shutting down")
            said = " ".join(failure.split()).removeprefix(f'model "{entry.name}": ')
            entry.failure, entry.failed_s = said, time.monotonic()
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
        """Measure on each device. On a thread like the loader's."""
        with self._one_thread():
            for device, model in zip(self._devices, entry.models, strict=True):
                model.in_turn = device.in_turn
                try:
                    measure_again(model)
                except Unavailable:
                    raise
                except Exception as error:  # memory that was there at load, perhaps; the size stays
                    log.warning(Event("measuring_failed", model=entry.name), exc_info=error)
                finally:
                    model.in_turn = at_once

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        """Let torch start no workers for this thread: they would slow down those of the device's, see `server.load`."""
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self._n_threads)  # of threads that begin later

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
        _ = models[0].digest  # computed here, not when the first answer tells it
        return models


def in_thread(run: Callable[[], _Value], *, name: str) -> "Future[_Value]":
    """Run a function in a thread of its own: a daemon, for one that hangs must not keep the process from ending."""
    future: Future[_Value] = Future()
    future.set_running_or_notify_cancel()  # several may wait for it: from here on nobody can cancel it

    def settle() -> None:
        try:
            future.set_result(run())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=settle, name=name, daemon=True).start()
    return future


def loaded_event(model: Model, **more: object) -> Event:
    """Say of a model that was loaded what was found out about it, as the log has it."""
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
    """Let what is wrong with a model say in which table it stands."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"models.{table}: {error}" if table else str(error)) from None


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1, -1
    return found.st_ino, found.st_size, found.st_mtime_ns


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
        # What can be seen now to be wrong need not wait for the first caller.
        with _naming(entry.name if entry.name in settings.models else ""):
            for path in entry.files():
                if not path.exists():
                    raise ConfigurationError(f"{path} is not there")
    return entry


def _failed(entry: Entry) -> FailedPrecondition:
    # Not why: a caller who may ask for maps need not learn the operator's paths.
    return FailedPrecondition(f'model "{entry.name}" could not be loaded; the server\'s log has the cause')
