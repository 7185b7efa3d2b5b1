"""The engine: answers requests on one or several devices. It knows neither protobuf nor gRPC."""

import asyncio
import contextlib
import functools
import logging
import math
import platform
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import torch

from ..compute.torch_device import choose_devices, cpu_quota, make_deterministic
from ..config.settings import ModelSettings, Settings
from ..config.spec import ModelSpec
from ..domain import MANY_EXAMPLES, Answer, Files, Provenance, Request, Timing, TopK
from ..errors import SidelightError, Unavailable
from ..methods.method import Shape
from ..models.model import Model
from ..telemetry.call_record import CallRecord
from ..telemetry.cancellation_latency import CancellationTimes
from ..telemetry.logs import Event
from .active_request import ActiveRequest
from .decoder_pool import DecoderPool, Fitted
from .device import Device, least_busy
from .preparation import (
    Prepared,
    check,
    input_shape,
    is_taken_as_it_is,
    maps_shape,
    needs_resizing,
    order,
    prepare,
    resolve_layer,
    runs_inline,
)
from .registry import Registry, Version

log = logging.getLogger("sidelight")

BYTES_OF_FLOAT32 = 4
# An example in progress holds itself, its baseline, two running sums and what is finished of it. Those of one request
# that are in progress at once have rows at the device, or came from there in the last chunk.
TENSORS_IN_PROGRESS = 5
EXAMPLES_IN_PROGRESS = 2
# What an example takes beside its bytes and its maps: it is an array, a resolved target, an explanation, a digest and a
# message.
BYTES_OF_EXAMPLE = 4096

_Value = TypeVar("_Value")


class Progress:
    """What a request in progress has so far, for a caller on the event loop who watches it."""

    def __init__(self) -> None:
        self.improved = asyncio.Event()  # set when there is something new
        self.snapshot: Callable[[], Awaitable[Answer]] | None = None

    async def take(self) -> Answer:
        """Return the newest there is. Called once `improved` is set."""
        self.improved.clear()
        assert self.snapshot is not None  # noqa: S101
        return await self.snapshot()


@dataclass(frozen=True, slots=True)
class _Clock:
    """When a request came, when it was let in, and when it was prepared."""

    arrived_s: float
    admitted_s: float
    prepared_s: float


class Engine:
    """Models on one device, and the thread that owns it; or on several, each with a thread and replicas of its own.

    Offered are modules at hand, and settings that name a source, from which a model can be loaded again. `start` (or
    `with`) begins to answer, `close` ends after the running chunk. `ConfigurationError` where a model cannot be served.
    """

    def __init__(
        self, offered: Sequence[ModelSpec | ModelSettings], settings: Settings | None = None, *, load: bool = True
    ) -> None:
        settings = settings or Settings()
        self.settings = settings
        self.on_change: Callable[[], None] = lambda: None  # a model was loaded, or a device lost; from any thread
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
        if load:  # else the caller does, before `start`
            self.registry.load()
        self._closing = threading.Event()
        # Each kind of work has threads of its own: what needs little must not wait behind another caller's much.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="sidelight-prepare")
        self._resizing = ThreadPoolExecutor(self.threads, thread_name_prefix="sidelight-resize")
        self._decoders = DecoderPool(self.threads)
        self._unanswered: dict[ActiveRequest, tuple[asyncio.Future[None], Device]] = {}
        self._software = (
            ("sidelight", metadata.version("sidelight")),
            ("torch", torch.__version__),
            ("numpy", np.__version__),
            ("python", platform.python_version()),
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Begin to answer."""
        for device in self._devices:
            device.worker.start()

    def tell_causes(self) -> None:
        """Tell callers what a model raised, and not the log alone: they are of this process."""
        for device in self._devices:
            device.worker.tells_causes = True

    def start_decoders(self) -> None:
        """Start the processes that decode files, where a model takes some; else each starts with the first file."""
        if any(model.preprocessing for model in self.models.values()):
            self._decoders.start()

    def close(self, within_s: float | None = None) -> bool:
        """End after the running chunk; False where that has not ended in time. What is unanswered is `Unavailable`."""
        self._closing.set()
        self.registry.close()
        self._decoders.close()
        for executor in (self._preparing, self._resizing):
            executor.shutdown(wait=False, cancel_futures=True)
        until_s = None if within_s is None else time.monotonic() + within_s
        has_ended = True
        for device in self._devices:
            has_ended &= device.worker.close(None if until_s is None else max(0.0, until_s - time.monotonic()))
        return has_ended

    def _abandon(self, device: Device) -> None:
        """Fail what is unanswered at a device: the thread that would answer it has ended."""
        unanswered = [(active, answered) for active, (answered, at) in list(self._unanswered.items()) if at is device]
        if not (self._closing.is_set() or device.worker.loss):  # of a lost device the log has the cause
            log.critical(Event("device_thread_ended", device=device.torch_device, unanswered=len(unanswered)))
        for active, answered in unanswered:
            active.cancel()
            failure = device.worker.unavailable("the server is shutting down")
            _call_from_thread(answered, functools.partial(_set_failed, error=failure))
        self.on_change()

    @property
    def devices(self) -> Sequence[Device]:
        """The devices, each with the thread that owns it."""
        return self._devices

    @property
    def stops(self) -> CancellationTimes:
        """How soon work ended on the device once it was cancelled."""
        return sum((device.worker.stops.times() for device in self._devices), start=CancellationTimes())

    @property
    def n_unanswered(self) -> int:
        """How many requests are at the device or wait for it."""
        return len(self._unanswered)

    @property
    def models(self) -> dict[str, Model]:
        """The versions that serve, by name, with what is the same of them on all devices."""
        return {entry.name: entry.models[0] for entry in self.registry.entries.values() if entry.models}

    def model(self, name: str) -> Model:
        """Return the version of a model that serves; empty means the default. `NotFound` with the near names."""
        return self.registry.serving(name)[0]

    def held_bytes(self, request: Request, version: Version) -> tuple[int, int]:
        """Return how many bytes the maps of the answer will take, and its examples while they are in progress.

        The latter with the pixels that files and pictures become, which are held until the answer is there, and with
        what each example takes however few bytes it has.
        """
        model = version[0]
        shape = maps_shape(model, request)
        n = 0 if request.method.is_one_row else min(shape[0], EXAMPLES_IN_PROGRESS * model.chunk_rows)
        n_elements = math.prod(input_shape(model, request.images))
        tensors_bytes = n * TENSORS_IN_PROGRESS * n_elements * model.kernel.dtype.itemsize
        # Each picture's, and once all are there those of the batch.
        pixels_bytes = 0 if is_taken_as_it_is(model, request.images) else 2 * shape[0] * n_elements
        return math.prod(shape) * BYTES_OF_FLOAT32, tensors_bytes + pixels_bytes + shape[0] * BYTES_OF_EXAMPLE

    def most_rows(self, request: Request, version: Version) -> int:
        """Return how many rows a request may take."""
        model, target = version[0], request.target
        rows = request.method.rows(input_shape(model, request.images))
        return maps_shape(model, request)[0] * rows * (target.k if isinstance(target, TopK) else 1)

    async def attribute(
        self,
        request: Request,
        progress: Progress | None = None,
        version: Version | None = None,
        call_record: CallRecord | None = None,
    ) -> Answer:
        """Return the maps of one batch. Cancelling the call drops its rows that have not run.

        A wrong request raises a `SidelightError`; an example that fails alone is in `Answer.failures`. With a
        `progress`, maps that are not final can be had from it meanwhile. The answer is by the model's `version` that
        serves when none is given, whatever is loaded meanwhile. A `call_record` is told the times.
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
        clock = _Clock(call_record.arrived_s, admitted_s, time.monotonic())
        call_record.examples, call_record.prepared_s = len(prepared.examples), clock.prepared_s
        answered: asyncio.Future[None] = loop.create_future()
        device = at or least_busy(self._devices)
        active = await apart_if_many(
            request.n_examples,
            ActiveRequest,
            request,
            version[device.index],
            prepared,
            on_done=lambda: _call_from_thread(answered, _set_done),
            on_improved=_from_thread(loop, progress.improved.set) if progress else None,
            id_=call_record.id,
            caller=call_record.caller,
            chunks=call_record.chunks,
        )
        if progress:
            progress.snapshot = functools.partial(
                apart_if_many, request.n_examples, self._answer, active, clock, final=False
            )
        if active.pending:
            self._unanswered[active] = answered, device
            try:
                with device.holds(active):
                    await answered
            finally:
                del self._unanswered[active]
                call_record.started_s, call_record.rows = active.started_s, active.n_taken
        return await apart_if_many(request.n_examples, self._answer, active, clock)

    async def _prepare(self, model: Model, request: Request, caller: str) -> Prepared:
        if runs_inline(model, request):
            return prepare(model, request, is_gone=self._closing.is_set)
        decoded: Sequence[Fitted] = ()
        if isinstance(request.images, Files):
            await apart_if_many(request.n_examples, check, model, request)  # before any file is decoded
            decoded = await self._decoders.fit(request.images.files, order(model), caller)
            if request.method.given is None:
                is_gone = self._closing.is_set
                return await apart_if_many(
                    request.n_examples, prepare, model, request, is_gone=is_gone, decoded=decoded
                )
        left = threading.Event()
        preparing = functools.partial(
            prepare, model, request, is_gone=lambda: left.is_set() or self._closing.is_set(), decoded=decoded
        )
        executor = self._resizing if needs_resizing(request.images) else self._preparing
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

    def _answer(self, active: ActiveRequest, clock: _Clock, *, final: bool = True) -> Answer:
        model, identity, now_s = active.model, active.identity, time.monotonic()
        started_s = active.started_s or now_s
        return Answer(
            request=replace(active.request, images=np.empty(0, np.uint8), model=model.name),
            **active.snapshot(),
            labels=model.labels,
            provenance=Provenance(
                model=model.name,
                model_version=model.version,
                model_digest=identity.digest,
                model_canary=identity.canary,
                precision=model.precision,
                head_precision=model.kernel.head_precision(active.request.score, plain_head=active.request.plain_head),
                kernel_options=model.kernel.options.names,
                device=str(model.kernel.device),
                threads=self.threads,
                chunk_rows=model.chunk_rows,
                reproducible=model.reproducible,
                baseline_digest=active.prepared.baseline_digest,
                software=self._software,
            ),
            timing=Timing(
                admission_s=clock.admitted_s - clock.arrived_s,
                prepare_s=clock.prepared_s - clock.admitted_s,
                queue_s=max(0.0, started_s - clock.prepared_s),
                compute_s=max(0.0, (active.ended_s if final else now_s) - started_s),
                total_s=now_s - clock.arrived_s,
            ),
            final=final,
        )


async def apart_if_many(
    n_examples: int, function: Callable[..., _Value], *arguments: object, **named: object
) -> _Value:
    """Call a function that takes time for each example: in a worker thread where there are many, else here and now."""
    if n_examples <= MANY_EXAMPLES:
        return function(*arguments, **named)
    return await asyncio.to_thread(function, *arguments, **named)


def _from_thread(loop: asyncio.AbstractEventLoop, told: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls another on a loop, unless that is closed."""

    def tell() -> None:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(told)

    return tell


def _set_done(answered: asyncio.Future[None]) -> None:
    answered.set_result(None)


def _set_failed(answered: asyncio.Future[None], *, error: SidelightError) -> None:
    answered.set_exception(error)


def _call_from_thread(answered: asyncio.Future[None], settle: Callable[[asyncio.Future[None]], None]) -> None:
    """Settle a future of another thread's loop, unless its waiter, or the whole loop, has gone."""

    def unless_gone() -> None:
        if not answered.done():
            settle(answered)

    _from_thread(answered.get_loop(), unless_gone)()
