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
from numpy.typing import NDArray

from .attribution import Answer, Provenance, Request, Timing
from .config import Settings
from .device import choose_device, cpu_quota
from .errors import ConfigurationError, FailedPrecondition, NotFound, Unavailable, near
from .models.model import Model
from .models.spec import ModelSpec
from .preparation import Prepared, maps_shape, needs_decoding, needs_no_work, prepare
from .runner import Runner
from .work import Work

log = logging.getLogger("sidelight")

BYTES_OF_FLOAT32 = 4


@dataclass(frozen=True, slots=True)
class _Clock:
    """When a request came, and when it was prepared."""

    arrived_s: float
    prepared_s: float


class Engine:
    """Models on one device, and the thread that owns it.

    It is made at once; `start` (or `with`) begins to answer, `close` ends after the running chunk.
    `ConfigurationError` where a model cannot be served.
    """

    def __init__(self, specs: Sequence[ModelSpec], settings: Settings | None = None) -> None:
        settings = settings or Settings()
        self.settings = settings
        self.device = choose_device(settings.device)
        self.threads = settings.threads or cpu_quota()
        traits = settings.traits()
        loaded = [Model(spec.completed(traits), device=self.device) for spec in specs]
        self.models = {model.name: model for model in loaded}
        if len(self.models) < len(loaded):
            raise ConfigurationError(f"name: two models are called the same, of {[model.name for model in loaded]}")
        self._runner = Runner(
            self.device, chunk_rows=settings.max_chunk_rows, threads=self.threads, on_end=self._abandon
        )
        self._closing = threading.Event()
        # Decoding has threads of its own: what needs none must not wait behind another caller's forty large files.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="sidelight-prepare")
        self._decoding = ThreadPoolExecutor(self.threads, thread_name_prefix="sidelight-decode")
        self._unanswered: dict[Work, asyncio.Future[None]] = {}
        self._software = (
            ("sidelight", metadata.version("sidelight")),
            ("torch", torch.__version__),
            ("python", platform.python_version()),
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Begin to answer."""
        self._runner.start()

    def close(self) -> None:
        """End after the running chunk. What is unanswered is `Unavailable`."""
        self._closing.set()
        for executor in (self._preparing, self._decoding):
            executor.shutdown(wait=False, cancel_futures=True)
        self._runner.close()

    def _abandon(self) -> None:
        """Fail what is unanswered: the thread that would answer it has ended."""
        if not self._closing.is_set():
            log.critical("event=device_thread_ended device=%s unanswered=%d", self.device, self.n_unanswered)
        for work, answered in list(self._unanswered.items()):
            work.cancel()
            _call_from_thread(answered, lambda each: each.set_exception(Unavailable("the server is shutting down")))

    @property
    def chunk_rows(self) -> int:
        """How many rows the device runs at once, at most."""
        return self._runner.chunk_rows

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

    def answer_bytes(self, request: Request) -> int:
        """Return how many bytes the maps of the answer will take."""
        return math.prod(maps_shape(self.model(request.model), request)) * BYTES_OF_FLOAT32

    async def attribute(self, request: Request) -> Answer:
        """Return the maps of one batch. Cancelling the call drops its rows that have not run.

        A wrong request raises a `SidelightError`; an example that fails alone is in `Answer.failures`.
        """
        arrived_s = time.monotonic()
        model = self.model(request.model)
        _check_score(model, request)
        loop = asyncio.get_running_loop()
        prepared = await self._prepare(model, request)
        prepared_s = time.monotonic()
        answered: asyncio.Future[None] = loop.create_future()
        work = Work(request, model, prepared, on_done=lambda: _call_from_thread(answered, _set_done))
        if work.pending:
            self._unanswered[work] = answered
            try:
                self._runner.submit(work)
                await answered
            finally:
                work.cancel()
                del self._unanswered[work]
        return self._answer(work, _Clock(arrived_s, prepared_s))

    async def _prepare(self, model: Model, request: Request) -> Prepared:
        left = threading.Event()
        preparing = functools.partial(
            prepare,
            model,
            request,
            max_pixels=self.settings.max_image_pixels,
            is_gone=lambda: left.is_set() or self._closing.is_set(),
        )
        if needs_no_work(model, request.images):
            return preparing()
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
        """Run every model of a fixed input size once at one row and at a whole chunk."""
        for model in self.models.values():
            if model.preprocessing is not None:
                shape = (model.preprocessing.height, model.preprocessing.width, model.preprocessing.channels)
                for n in sorted({1, self.chunk_rows}):
                    answer = await self.attribute(Request(np.zeros((n, *shape), np.uint8), model=model.name))
                    if answer.failures:
                        log.warning(
                            'event=warm_up_failed model="%s" message=%r', model.name, answer.failures[0].message
                        )

    def _answer(self, work: Work, clock: _Clock) -> Answer:
        model, now_s = work.model, time.monotonic()
        return Answer(
            request=replace(work.request, images=np.empty(0, np.uint8), model=model.name),
            maps=work.maps(),
            explanations=tuple(work.explanations),
            labels=model.labels,
            provenance=Provenance(
                model=model.name,
                model_version=model.version,
                model_digest=model.digest,
                precision=model.precision,
                device=str(self.device),
                threads=self.threads,
                chunk_rows=self.chunk_rows,
                software=self._software,
            ),
            timing=Timing(
                prepare_s=clock.prepared_s - clock.arrived_s,
                queue_s=max(0.0, work.started_s - clock.prepared_s),
                compute_s=work.ended_s - work.started_s,
                total_s=now_s - clock.arrived_s,
            ),
            failures=tuple(sorted(work.failures, key=lambda failure: failure.example)),
            probabilities=_probabilities(work),
        )


def _check_score(model: Model, request: Request) -> None:
    if request.score not in model.scores:
        has = ", ".join(score.value for score in model.scores)
        raise FailedPrecondition(
            f'score: model "{model.name}" returns {model.outputs}, so it has no {request.score.value}; it has {has}'
        )


def _probabilities(work: Work) -> NDArray[np.float32] | None:
    if not work.request.probabilities:
        return None
    if work.probabilities is not None:
        return work.probabilities
    return np.full((len(work.explanations), work.model.class_count), np.nan, np.float32)


def _set_done(answered: asyncio.Future[None]) -> None:
    answered.set_result(None)


def _call_from_thread(answered: asyncio.Future[None], settle: Callable[[asyncio.Future[None]], None]) -> None:
    """Settle a future of another thread's loop, unless its waiter, or the whole loop, has gone."""

    def unless_gone() -> None:
        if not answered.done():
            settle(answered)

    with contextlib.suppress(RuntimeError):  # the loop is closed
        answered.get_loop().call_soon_threadsafe(unless_gone)
