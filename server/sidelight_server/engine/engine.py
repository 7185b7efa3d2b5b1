"""The engine: answers requests on one or several devices, without protobuf or gRPC."""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Self, TypeVar

import numpy as np

from ..compute.torch_device import choose_devices, cpu_quota, make_deterministic
from ..config.model_settings import ModelSettings
from ..config.settings import Settings
from ..config.spec import ModelSpec
from ..domain import Answer, Array, Request
from ..inputs.decode_worker import PictureOrder
from ..methods.method import Shape
from ..models.model import Model
from ..telemetry.call_record import CallRecord
from ..telemetry.counters import CancellationTimes
from ..telemetry.logs import Event
from .active_request import ActiveRequest
from .answer import Clock, assemble_answer, software_versions
from .devices.device import Device, least_busy
from .preparation.pool import PreparationPool
from .registry.entry import Version
from .registry.registry import Registry
from .submission import OnDone, Outcome, Submission, SubmissionContext, store_outcome

log = logging.getLogger("sidelight")

_Value = TypeVar("_Value")


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
        self._pool = PreparationPool(self.threads)
        self._unanswered: set[Submission] = set()
        self._submission_context = SubmissionContext(
            self._pool, functools.partial(least_busy, self._devices), self._assemble, self._unanswered
        )
        self._software = software_versions()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        for device in self._devices:
            device.worker.start()

    def expose_causes(self) -> None:
        """Include a model's exception in the error that callers get. For callers in this process only."""
        for device in self._devices:
            device.worker.errors.exposes_causes = True

    def start_decoders(self) -> None:
        """Start the decoder processes now if a model takes files; otherwise they start with the first file."""
        if any(model.preprocessing for model in self.models.values()):
            self._pool.start_decoders()

    def close(self, within_s: float | None = None, *, waits_for_preparation: bool = False) -> bool:
        """Stop after the running chunk, failing unanswered requests with `Unavailable`.

        Returns False if a worker thread has not ended within `within_s` seconds.
        """
        self.registry.close()
        self._pool.close(wait=waits_for_preparation)
        until_s = None if within_s is None else time.monotonic() + within_s
        has_ended = True
        for device in self._devices:
            has_ended &= device.worker.close(None if until_s is None else max(0.0, until_s - time.monotonic()))
        return has_ended

    def _abandon(self, device: Device) -> None:
        """Fail a device's unanswered requests: its thread has ended."""
        unanswered = [each for each in list(self._unanswered) if each.device is device]
        if not (self._pool.is_gone() or device.worker.loss):  # for a lost device the worker has logged the cause
            log.critical(Event("device_thread_ended", device=device.torch_device, unanswered=len(unanswered)))
        for each in unanswered:
            each.fail_soon(device.worker.unavailable("the server is shutting down"))
        self.on_change()

    @property
    def devices(self) -> Sequence[Device]:
        return self._devices

    @property
    def cancellations(self) -> CancellationTimes:
        return sum((device.worker.cancellations for device in self._devices), start=CancellationTimes())

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

    def submit(
        self,
        request: Request,
        on_done: OnDone,
        *,
        version: Version | None = None,
        on_improved: Callable[[], None] | None = None,
        call_record: CallRecord | None = None,
        device: Device | None = None,
    ) -> Submission:
        """Explain one batch. Returns at once; `on_done` gets the `Answer`, or the exception that it failed with.

        Call it on a running event loop, on which `on_done` is then called, once and after this has returned. Raises a
        `SidelightError` if the request is rejected at once; an example that fails alone is in `Answer.failures`.
        `on_improved` is called when `Submission.partial` has a newer answer to give. `version` defaults to the version
        that serves now, which a lazy model loads first; a reload in between does not change it. The stages' times are
        written to `call_record`. `device` defaults to the one with the fewest rows.
        """
        submission = Submission(
            request, on_done, self._submission_context, on_improved=on_improved, call_record=call_record, device=device
        )
        if version := version or self.registry.find(request.model).models:
            submission.start(version)
        else:
            submission.start_when(functools.partial(self.registry.ready, request.model))
        return submission

    async def attribute(
        self,
        request: Request,
        *,
        version: Version | None = None,
        call_record: CallRecord | None = None,
        device: Device | None = None,
    ) -> Answer:
        """`submit` a request and wait for its answer. Cancelling the call drops its rows that have not run."""
        answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        submission = self.submit(
            request, functools.partial(store_outcome, answered), version=version, call_record=call_record, device=device
        )
        try:
            outcome = await answered
        finally:
            submission.cancel()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def picture(self, file: bytes, order: PictureOrder, caller: str) -> Array:
        return await self._pool.picture(file, order, caller)

    async def draw(self, drawing: Callable[[], _Value], caller: str) -> _Value:
        return await self._pool.draw(drawing, caller)

    def _assemble(self, active: ActiveRequest, clock: Clock, *, final: bool = True) -> Answer:
        return assemble_answer(
            active, clock, backlog_s=self.backlog_s, threads=self.threads, software=self._software, final=final
        )

    async def warm_up(self) -> None:
        """Calibrate every model's chunk size, check its settings, and run zeros through the whole path.

        Raises `ConfigurationError` if a model does not support its settings.
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
            answer = await self.attribute(Request(zeros, model=model.name), device=device)
            if answer.failures:
                log.warning(Event("warm_up_failed", model=model.name, message=answer.failures[0].message))
