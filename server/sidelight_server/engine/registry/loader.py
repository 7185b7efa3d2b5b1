"""The loader: loads new versions of models while others serve, each in its own thread."""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch

from ...errors import ConfigurationError, FailedPrecondition, Unavailable
from ...models.model import Model
from ...models.trial.in_turn import InTurn, at_once
from ...models.warmup import apply_fixed_size, measure_again, warm_up
from ...telemetry.logs import Event
from ..completion import complete
from ..devices.device import Device, NeverIdle
from .entry import Entry, Version

log = logging.getLogger("sidelight")

_Value = TypeVar("_Value")

MAX_IDLE_WAIT_S = 10.0  # a reload of the model waits as long

NO_TURN = contextlib.nullcontext()


class Loader:
    """Loads models for the registry. A load runs its passes on a device between the chunks of requests.

    `on_change` is called on the loading thread when a new version begins to serve.
    """

    def __init__(self, devices: Sequence[Device], *, on_change: Callable[[], None]) -> None:
        self._devices = devices
        self._on_change = on_change
        self._n_threads = torch.get_num_threads()
        self._is_closed = False

    def close(self) -> None:
        """Refuse further loads."""
        self._is_closed = True

    def submit(self, load: Callable[[], None], turn: threading.Lock) -> "Future[None]":
        """Run a load in a thread that holds `turn`. It raises `Unavailable` once the loader is closed."""

        def run() -> None:
            if self._is_closed:
                raise Unavailable("the server is shutting down")
            load()

        return in_thread(run, name="sidelight-load", turn=turn)

    def load(self, entry: Entry) -> None:
        """Load a version and make it the serving one. Runs on the loader's thread."""
        began, before = time.monotonic(), entry.models
        failure = None
        try:
            entry.models = self._load_version(entry, before)
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

    def _load_version(self, entry: Entry, before: Version) -> Version:
        with self._one_thread():
            version = before[0].version + 1 if before else 1
            models = self.build(entry, version, turns=[device.in_turn for device in self._devices])
            for device, model in zip(self._devices, models, strict=True):
                warm_up(model, before=before[device.index] if before else None)
                model.in_turn = at_once
        return models

    def measure_again(self, entry: Entry) -> None:
        """Measure the chunk size on each device while it is idle. Runs on a thread of its own, like a load."""
        until_s = time.monotonic() + MAX_IDLE_WAIT_S
        with self._one_thread():
            for device, model in zip(self._devices, entry.models, strict=True):
                model.in_turn = functools.partial(device.when_idle, until_s=until_s)
                try:
                    measure_again(model)
                except NeverIdle:
                    continue  # measured again after the next interval
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

    def build(self, entry: Entry, version: int, *, turns: Sequence[InTurn]) -> Version:
        """Return a new version: one model for each device, whose device tasks run in the given turns."""
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
            apply_fixed_size(model)
        _ = models[0].digest  # computed here, not with the first answer
        return models


def in_thread(
    run: Callable[[], _Value], *, name: str, turn: contextlib.AbstractContextManager[object] = NO_TURN
) -> "Future[_Value]":
    """Run a function in a new daemon thread, so that a hanging function does not keep the process from exiting.

    The future is running once the thread has entered `turn`. Shield it: several callers may wait for it.
    """
    future: Future[_Value] = Future()

    def set_result() -> None:
        with turn:
            if not future.set_running_or_notify_cancel():
                return
            complete(future, run)

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
