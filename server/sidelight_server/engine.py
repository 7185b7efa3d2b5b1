"""The engine: answers requests on one device. It knows neither the wire nor the network."""

import asyncio
import contextlib
import functools
import logging
import math
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from types import TracebackType
from typing import Self

import numpy as np
import torch

from .attribution import Answer, Provenance, Request, Timing
from .calibration import choose_chunk_rows, compare_exact, same_bytes
from .config import Settings
from .device import choose_devices, cpu_quota, make_deterministic
from .errors import ConfigurationError, NotFound, Unavailable, near
from .models.model import Model
from .models.spec import ModelSpec
from .preparation import Prepared, input_shape, maps_shape, needs_decoding, needs_no_work, prepare, settled
from .station import Station, least_busy
from .stops import StopTimes
from .work import Work

log = logging.getLogger("sidelight")

BYTES_OF_FLOAT32 = 4
# An example in progress holds itself, its baseline, two running sums and what is finished of it. Those of one request
# that are in progress at once have rows at the device, or came from there in the last chunk.
TENSORS_IN_PROGRESS = 5
EXAMPLES_IN_PROGRESS = 2


class Progress:
    """What a request in progress has so far, for a caller on the event loop who watches it."""

    def __init__(self) -> None:
        self.improved = asyncio.Event()  # set when there is something new
        self.snapshot: Callable[[], Answer] | None = None

    def take(self) -> Answer:
        """Return the newest there is. Called once `improved` is set."""
        self.improved.clear()
        assert self.snapshot is not None  # noqa: S101
        return self.snapshot()


@dataclass(frozen=True, slots=True)
class _Clock:
    """When a request came, and when it was prepared."""

    arrived_s: float
    prepared_s: float


class Engine:
    """Models on one device, and the thread that owns it; or on several, each with a thread and replicas of its own.

    It is made at once; `start` (or `with`) begins to answer, `close` ends after the running chunk.
    `ConfigurationError` where a model cannot be served.
    """

    def __init__(self, specs: Sequence[ModelSpec], settings: Settings | None = None) -> None:
        settings = settings or Settings()
        self.settings = settings
        devices = choose_devices(settings.device)
        self.device = ",".join(map(str, devices))
        self.threads = settings.threads or max(1, cpu_quota() // max(1, [each.type for each in devices].count("cpu")))
        traits = settings.traits()
        completed = [spec.completed(traits) for spec in specs]
        self._stations = [self._station(device, completed) for device in devices]
        self.models = self._stations[0].models  # for what is the same on all devices
        self._runner = self._stations[0].runner
        self._closing = threading.Event()
        # Decoding has threads of its own: what needs none must not wait behind another caller's forty large files.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="sidelight-prepare")
        self._decoding = ThreadPoolExecutor(self.threads, thread_name_prefix="sidelight-decode")
        self._unanswered: dict[Work, asyncio.Future[None]] = {}
        self._software = (
            ("sidelight", metadata.version("sidelight")),
            ("torch", torch.__version__),
            ("numpy", np.__version__),
            ("python", platform.python_version()),
        )

    def _station(self, device: torch.device, specs: Sequence[ModelSpec]) -> Station:
        if self.settings.reproducible:
            make_deterministic(device)
        loaded = [Model(spec, device=device) for spec in specs]
        if len({model.name for model in loaded}) < len(loaded):
            raise ConfigurationError(f"name: two models are called the same, of {[model.name for model in loaded]}")
        for model in loaded:
            self._limit(model)
        return Station(device, loaded, threads=self.threads, on_end=self._abandon)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Begin to answer."""
        for station in self._stations:
            station.runner.start()

    def close(self) -> None:
        """End after the running chunk. What is unanswered is `Unavailable`."""
        self._closing.set()
        for executor in (self._preparing, self._decoding):
            executor.shutdown(wait=False, cancel_futures=True)
        for station in self._stations:
            station.runner.close()

    def _abandon(self, station: Station) -> None:
        """Fail what is unanswered at a station: the thread that would answer it has ended."""
        unanswered = [each for each in list(self._unanswered.items()) if each[0].model in station.models.values()]
        if not self._closing.is_set():
            log.critical("event=device_thread_ended device=%s unanswered=%d", station.device, len(unanswered))
        for work, answered in unanswered:
            work.cancel()
            _call_from_thread(answered, lambda each: each.set_exception(Unavailable("the server is shutting down")))

    @property
    def stops(self) -> StopTimes:
        """How soon work ended on the device once it was cancelled."""
        return sum((station.runner.stops.times() for station in self._stations), start=StopTimes())

    @property
    def n_unanswered(self) -> int:
        """How many requests are at the device or wait for it."""
        return len(self._unanswered)

    def model(self, name: str) -> Model:
        """Return a model by its name; empty means the default. `NotFound` with the near names."""
        try:
            return self.models[name or next(iter(self.models))]
        except KeyError:
            raise NotFound(f'model: there is no "{name}"; {near(name, self.models)}') from None

    def held_bytes(self, request: Request) -> tuple[int, int]:
        """Return how many bytes the maps of the answer will take, and its examples while they are in progress."""
        model = self.model(request.model)
        shape = maps_shape(model, request)
        n = 0 if request.method.is_one_row else min(shape[0], EXAMPLES_IN_PROGRESS * model.chunk_rows)
        tensor_bytes = math.prod(input_shape(model, request.images)) * model.kernel.dtype.itemsize
        return math.prod(shape) * BYTES_OF_FLOAT32, n * TENSORS_IN_PROGRESS * tensor_bytes

    async def attribute(self, request: Request, progress: Progress | None = None) -> Answer:
        """Return the maps of one batch. Cancelling the call drops its rows that have not run.

        A wrong request raises a `SidelightError`; an example that fails alone is in `Answer.failures`. With a
        `progress`, maps that are not final can be had from it meanwhile.
        """
        return await self._attribute(request, progress)

    async def _attribute(self, request: Request, progress: Progress | None, at: Station | None = None) -> Answer:
        arrived_s = time.monotonic()
        model = self.model(request.model)
        method = settled(model, request, max_rows=self.settings.max_example_rows)
        if method is not request.method:
            request = replace(request, method=method)
        loop = asyncio.get_running_loop()
        prepared = await self._prepare(model, request)
        clock = _Clock(arrived_s, time.monotonic())
        answered: asyncio.Future[None] = loop.create_future()
        station = at or least_busy(self._stations)
        work = Work(
            request,
            station.models[model.name],
            prepared,
            on_done=lambda: _call_from_thread(answered, _set_done),
            on_improved=_from_thread(loop, progress.improved.set) if progress else None,
        )
        if progress:
            progress.snapshot = functools.partial(self._answer, work, clock, final=False)
        if work.pending:
            self._unanswered[work] = answered
            try:
                with station.holds(work):
                    await answered
            finally:
                del self._unanswered[work]
        return self._answer(work, clock)

    async def _prepare(self, model: Model, request: Request) -> Prepared:
        max_pixels = self.settings.max_image_pixels
        if needs_no_work(model, request):
            return prepare(model, request, max_pixels=max_pixels, is_gone=self._closing.is_set)
        left = threading.Event()
        preparing = functools.partial(
            prepare,
            model,
            request,
            max_pixels=max_pixels,
            is_gone=lambda: left.is_set() or self._closing.is_set(),
        )
        executor = self._decoding if needs_decoding(request.images) else self._preparing
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, preparing)
        except RuntimeError as error:  # the pool takes nothing more
            if not self._closing.is_set():
                raise
            raise Unavailable("the server is shutting down") from error
        finally:
            left.set()

    async def warm_up(self) -> None:
        """Find every model's size of chunk, check what was promised of it, and run one chunk of zeros through it all.

        `ConfigurationError` where the settings ask for what a model cannot give.
        """
        for station in self._stations:
            for model in station.models.values():
                await asyncio.wrap_future(station.runner.call(functools.partial(self._calibrate, model)))
                if model.preprocessing is not None:
                    await self._run_zeros(model, station)

    async def _run_zeros(self, model: Model, station: Station) -> None:
        assert model.preprocessing is not None  # noqa: S101
        shape = (model.preprocessing.height, model.preprocessing.width, model.preprocessing.channels)
        for n in sorted({1, model.chunk_rows}):
            request = Request(np.zeros((n, *shape), np.uint8), model=model.name)
            answer = await self._attribute(request, None, at=station)
            if answer.failures:
                log.warning('event=warm_up_failed model="%s" message=%r', model.name, answer.failures[0].message)

    def _limit(self, model: Model) -> None:
        """Set what the settings say of a model's chunks. What they leave open is measured in `warm_up`."""
        settings = self.settings
        if settings.reproducible:
            model.padded_rows = model.chunk_rows = settings.reproducible_rows
        elif settings.max_chunk_rows and not model.rows_touch:
            model.chunk_rows = settings.max_chunk_rows

    def _calibrate(self, model: Model) -> None:
        """Check what is promised of a model's chunks, or measure them. On the thread that owns the device."""
        settings = self.settings
        if settings.reproducible:
            _check_promise(model, settings.reproducible_rows)
        elif model.preprocessing is not None and not settings.max_chunk_rows and not model.rows_touch:
            model.chunk_rows, model.warm_up = choose_chunk_rows(
                model, max_chunk_s=settings.max_chunk_s, device_memory_limit=settings.device_memory_limit
            )
            if not same_bytes(model, 1):
                model.chunk_rows = 1
                log.warning(
                    'event=runs_differ model="%s" message="each run gives other bytes: rows run alone"', model.name
                )
        self._compare(model)

    def _compare(self, model: Model) -> None:
        """Measure what the operator's options bring, and tell the log everything that was tried."""
        if model.preprocessing is None or model.kernel.options.is_exact:
            return
        trials, likeness = compare_exact(model)
        model.warm_up = (*trials, *model.warm_up)
        for trial in model.warm_up:
            log.info(
                'event=tried model="%s" configuration=%s rows=%d rows_per_s=%.1f chosen=%s',
                model.name, trial.configuration, trial.rows, trial.rows_per_second, str(trial.chosen).lower(),
            )  # fmt: skip
        log.info(
            'event=compared model="%s" configuration=%s rank_correlation=%.4f', model.name, model.kernel.told, likeness
        )

    def _answer(self, work: Work, clock: _Clock, *, final: bool = True) -> Answer:
        model, now_s = work.model, time.monotonic()
        started_s = work.started_s or now_s
        return Answer(
            request=replace(work.request, images=np.empty(0, np.uint8), model=model.name),
            **work.snapshot(),
            labels=model.labels,
            provenance=Provenance(
                model=model.name,
                model_version=model.version,
                model_digest=model.digest,
                precision=model.precision,
                kernel_options=model.kernel.options.names,
                device=str(model.kernel.device),
                threads=self.threads,
                chunk_rows=model.chunk_rows,
                reproducible=model.reproducible,
                baseline_digest=work.prepared.baseline_digest,
                software=self._software,
            ),
            timing=Timing(
                prepare_s=clock.prepared_s - clock.arrived_s,
                queue_s=max(0.0, started_s - clock.prepared_s),
                compute_s=max(0.0, (work.ended_s if final else now_s) - started_s),
                total_s=now_s - clock.arrived_s,
            ),
            final=final,
        )


def _check_promise(model: Model, rows: int) -> None:
    """Refuse with `ConfigurationError` a model that does not give the same bytes in chunks of exactly so many rows."""
    if rows > 1 and (model.preprocessing is None or model.rows_touch):
        why = "lets its rows touch each other" if model.rows_touch else "has no input size to check it with"
        raise ConfigurationError(f'reproducible_rows: got {rows}, but model "{model.name}" {why}; set it to 1')
    if model.preprocessing is not None and not same_bytes(model, rows):
        raise ConfigurationError(
            f'reproducible_rows: got {rows}, but model "{model.name}" gives an example other bytes in another place '
            "or company; set it to 1"
            if rows > 1
            else f'reproducible: model "{model.name}" gives other bytes each time it runs on the same input'
        )


def _from_thread(loop: asyncio.AbstractEventLoop, told: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls another on a loop, unless that is closed."""

    def tell() -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(told)

    return tell


def _set_done(answered: asyncio.Future[None]) -> None:
    answered.set_result(None)


def _call_from_thread(answered: asyncio.Future[None], settle: Callable[[asyncio.Future[None]], None]) -> None:
    """Settle a future of another thread's loop, unless its waiter, or the whole loop, has gone."""

    def unless_gone() -> None:
        if not answered.done():
            settle(answered)

    _from_thread(answered.get_loop(), unless_gone)()
