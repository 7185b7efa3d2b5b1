"""The engine: answers requests on one or several devices, without protobuf or gRPC."""

import asyncio
import functools
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar

import numpy as np

from ..compute.host_memory import limit_bytes
from ..compute.torch_device import choose_devices, cpu_quota, make_deterministic
from ..config.model_settings import ModelSettings
from ..config.settings import Settings
from ..config.spec import ModelSpec
from ..domain import MANY_EXAMPLES, Answer, Files, Request
from ..methods.method import Shape
from ..models.model import Model
from ..telemetry.call_record import CallRecord
from ..telemetry.cancellation_latency import CancellationTimes
from ..telemetry.logs import Event
from .active_request import ActiveRequest
from .answer import Clock, assemble_answer, software_versions
from .completion import call_soon, complete
from .decoder_pool import DecoderPool
from .decoder_process import Fitted
from .device import Device, least_busy
from .fair_thread_pool import FairThreadPool
from .model_entry import Version
from .preparation import Prepared, check, needs_resizing, order, prepare, resolve_layer, runs_inline
from .registry import Registry

log = logging.getLogger("sidelight")


_Value = TypeVar("_Value")


class Progress:
    """Access to the partial answer of a request in progress. Used on the event loop."""

    def __init__(self) -> None:
        self.improved = asyncio.Event()  # set when a newer partial answer exists
        self.snapshot: Callable[[], Awaitable[Answer]] | None = None

    async def take(self) -> Answer:
        """Return the newest partial answer. Called once `improved` is set."""
        self.improved.clear()
        assert self.snapshot is not None  # noqa: S101
        return await self.snapshot()


class Engine:
    """Serves models on one or several devices, each with its own worker thread and model replicas.

    Each of `offered` is a module in a `ModelSpec`, or `ModelSettings` that name a source, which can be reloaded.
    `start` (or `with`) starts the worker threads; `close` stops them after the running chunk. Raises
    `ConfigurationError` if a model cannot be served.
    """

    def __init__(
        self, offered: Sequence[ModelSpec | ModelSettings], settings: Settings | None = None, *, load: bool = True
    ) -> None:
        settings = settings or Settings()
        self.settings = settings
        self.on_change: Callable[[], None] = lambda: None  # a model was loaded or a device lost; called on any thread
        devices = choose_devices(settings.device)
        self.device = ",".join(map(str, devices))
        self.threads = settings.threads or max(1, cpu_quota() // max(1, [each.type for each in devices].count("cpu")))
        if any(each.reproducible for each in (settings, *settings.models.values())):
            for device in devices:
                make_deterministic(device)
        self._devices = [
            Device(device, index=index, threads=self.threads, stuck_s=settings.stuck_s, on_end=self._abandon)
            for index, device in enumerate(devices)
        ]
        self.registry = Registry(offered, settings, self._devices, on_change=lambda: self.on_change())
        if load:  # otherwise the caller must load, before `start`
            self.registry.load()
        self._closing = threading.Event()
        # One pool per kind of work, so that short work does not wait behind another caller's long work.
        self._preparing = FairThreadPool(1, name="sidelight-prepare")
        self._resizing = FairThreadPool(self.threads, name="sidelight-resize")
        self._decoders = DecoderPool(self.threads, memory_bytes=limit_bytes())
        self._unanswered: dict[ActiveRequest, tuple[asyncio.Future[None], Device]] = {}
        self._software = software_versions()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Start the worker threads."""
        for device in self._devices:
            device.worker.start()

    def expose_causes(self) -> None:
        """Include a model's exception in the error that callers get. For callers in this process only."""
        for device in self._devices:
            device.worker.errors.exposes_causes = True

    def start_decoders(self) -> None:
        """Start the decoder processes now if a model takes files; otherwise they start with the first file."""
        if any(model.preprocessing for model in self.models.values()):
            self._decoders.start()

    def close(self, within_s: float | None = None) -> bool:
        """Stop after the running chunk, failing unanswered requests with `Unavailable`.

        Returns False if a worker thread has not ended within `within_s` seconds.
        """
        self._closing.set()
        self.registry.close()
        self._decoders.close()
        for pool in (self._preparing, self._resizing):
            pool.close()
        until_s = None if within_s is None else time.monotonic() + within_s
        has_ended = True
        for device in self._devices:
            has_ended &= device.worker.close(None if until_s is None else max(0.0, until_s - time.monotonic()))
        return has_ended

    def _abandon(self, device: Device) -> None:
        """Fail a device's unanswered requests: its thread has ended."""
        unanswered = [(active, answered) for active, (answered, at) in list(self._unanswered.items()) if at is device]
        if not (self._closing.is_set() or device.worker.loss):  # for a lost device the worker has logged the cause
            log.critical(Event("device_thread_ended", device=device.torch_device, unanswered=len(unanswered)))
        for active, answered in unanswered:
            active.cancel()
            failure = device.worker.unavailable("the server is shutting down")
            complete(answered, failure)
        self.on_change()

    @property
    def devices(self) -> Sequence[Device]:
        """The devices, each with its worker thread."""
        return self._devices

    @property
    def stops(self) -> CancellationTimes:
        """Cancellation latency: the time from a cancel until none of its rows runs on the device."""
        return sum((device.worker.stops.times() for device in self._devices), start=CancellationTimes())

    @property
    def n_unanswered(self) -> int:
        """Number of requests that run on a device or wait for it."""
        return len(self._unanswered)

    @property
    def backlog_s(self) -> float:
        """Seconds of work that wait or run: the mean of the devices."""
        return sum(device.backlog_s for device in self._devices) / len(self._devices)

    @property
    def models(self) -> dict[str, Model]:
        """The serving version of each loaded model, by name, as its replica on the first device."""
        return {entry.name: entry.models[0] for entry in self.registry.entries.values() if entry.models}

    def model(self, name: str) -> Model:
        """Return the serving version of a model; empty means the default. Raises `NotFound`."""
        return self.registry.serving(name)[0]

    async def attribute(
        self,
        request: Request,
        progress: Progress | None = None,
        version: Version | None = None,
        call_record: CallRecord | None = None,
    ) -> Answer:
        """Return the maps of one batch. Cancelling the call drops its rows that have not run.

        Raises a `SidelightError` if the request is invalid; an example that fails alone is in `Answer.failures`.
        `progress` gives access to partial maps. `version` defaults to the version that serves now; a reload in between
        does not change it. The stages' times are written to `call_record`.
        """
        version = version or await self.registry.ready(request.model)
        return await self._attribute(request, progress, version, call_record=call_record)

    async def _attribute(
        self,
        request: Request,
        progress: Progress | None,
        version: Version,
        *,
        at: Device | None = None,
        call_record: CallRecord | None = None,
    ) -> Answer:
        admitted_s = time.monotonic()
        call_record = call_record or CallRecord("", admitted_s)
        model = version[0]
        method = resolve_layer(model, request)
        if method is not request.method:
            request = replace(request, method=method)
        loop = asyncio.get_running_loop()
        prepared = await self._prepare(model, request, call_record.caller)
        clock = Clock(call_record.arrived_s, admitted_s, time.monotonic())
        call_record.examples, call_record.prepared_s = len(prepared.examples), clock.prepared_s
        answered: asyncio.Future[None] = loop.create_future()
        device = at or least_busy(self._devices)
        active = await to_thread_if_many(
            request.n_examples,
            ActiveRequest,
            request,
            version[device.index],
            prepared,
            on_done=functools.partial(complete, answered),
            on_improved=functools.partial(call_soon, loop, progress.improved.set) if progress else None,
            id_=call_record.id,
            caller=call_record.caller,
            chunks=call_record.chunks,
        )
        if progress:
            progress.snapshot = functools.partial(
                to_thread_if_many, request.n_examples, self._assemble, active, clock, final=False
            )
        if active.pending:
            self._unanswered[active] = answered, device
            try:
                with device.holds(active):
                    await answered
            finally:
                del self._unanswered[active]
                call_record.started_s, call_record.rows = active.started_s, active.n_taken
        return await to_thread_if_many(request.n_examples, self._assemble, active, clock)

    def _assemble(self, active: ActiveRequest, clock: Clock, *, final: bool = True) -> Answer:
        return assemble_answer(
            active, clock, backlog_s=self.backlog_s, threads=self.threads, software=self._software, final=final
        )

    async def _prepare(self, model: Model, request: Request, caller: str) -> Prepared:
        if runs_inline(model, request):
            return prepare(model, request, is_gone=self._closing.is_set)
        decoded: Sequence[Fitted] = ()
        if isinstance(request.images, Files):
            await to_thread_if_many(request.n_examples, check, model, request)  # before any file is decoded
            decoded = await self._decoders.fit(request.images.files, order(model), caller)
            if request.method.given is None:
                is_gone = self._closing.is_set
                return await to_thread_if_many(
                    request.n_examples, prepare, model, request, is_gone=is_gone, decoded=decoded
                )
        left = threading.Event()
        preparing = functools.partial(
            prepare, model, request, is_gone=lambda: left.is_set() or self._closing.is_set(), decoded=decoded
        )
        pool = self._resizing if needs_resizing(request.images) else self._preparing
        try:
            return await asyncio.wrap_future(pool.submit(caller, preparing))
        finally:
            left.set()

    async def warm_up(self) -> None:
        """Calibrate every model's chunk size, check its settings, and run zeros through the whole path.

        Raises `ConfigurationError` if a model cannot do what the settings ask for.
        """
        for device in self._devices:
            task = functools.partial(self.registry.warm_up, device)
            for model in await asyncio.wrap_future(device.worker.call(task)):
                if model.trial_shape is not None and model.serves_gradients:
                    await self._run_zeros(model, model.trial_shape, device)

    async def _run_zeros(self, model: Model, shape: Shape, device: Device) -> None:
        c, h, w = shape
        for n in sorted({1, model.chunk_rows}):
            zeros = np.zeros((n, h, w, c), np.uint8) if model.preprocessing else np.zeros((n, c, h, w), np.float32)
            answer = await self._attribute(Request(zeros), None, self.registry.serving(model.name), at=device)
            if answer.failures:
                log.warning(Event("warm_up_failed", model=model.name, message=answer.failures[0].message))


async def to_thread_if_many(
    n_examples: int, function: Callable[..., _Value], *arguments: object, **named: object
) -> _Value:
    """Call a function whose time grows with the examples: in a worker thread if there are many, else directly."""
    if n_examples <= MANY_EXAMPLES:
        return function(*arguments, **named)
    return await asyncio.to_thread(function, *arguments, **named)
