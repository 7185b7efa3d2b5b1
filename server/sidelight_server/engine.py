"""The engine: answers requests on one device. It knows neither the wire nor the network."""

import asyncio
import contextlib
import logging
import platform
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

from .attribution import Answer, Array, Channels, Files, PerExample, Predicted, Provenance, Request, Target, Timing
from .config import Settings
from .device import choose_device, cpu_quota
from .errors import FailedPrecondition, InvalidArgument, NotFound, SidelightError, Unavailable, near
from .models.decoding import decode
from .models.model import Model
from .models.preprocessing import Geometry, Preprocessing
from .models.spec import ModelSpec
from .runner import Runner
from .work import Prepared, Work

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
        self._runner = Runner(self.device, chunk_rows=settings.max_chunk_rows, threads=self.threads)
        self._preparing = ThreadPoolExecutor(max_workers=self.threads, thread_name_prefix="sidelight-prepare")
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
        self._runner.close()
        self._preparing.shutdown()
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
        model = self.model(request.model)
        c, h, w = _input_shape(model, request.images)
        n = _n_examples(request.images)
        return n * h * w * (c if request.channels is Channels.NONE else 1) * BYTES_OF_FLOAT32

    async def attribute(self, request: Request) -> Answer:
        """Return the maps of one batch. Cancelling the call drops its rows that have not run.

        A wrong request raises a `SidelightError`; an example that fails alone is in `Answer.failures`.
        """
        arrived_s = time.monotonic()
        model = self.model(request.model)
        _check_score(model, request)
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self._preparing, self._prepare, model, request)
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

    def _prepare(self, model: Model, request: Request) -> Prepared:
        fitted = _fit(model, request.images, max_pixels=self.settings.max_image_pixels)
        return Prepared(
            examples=[each if isinstance(each, SidelightError) else each[0] for each in fitted],
            geometries=[None if isinstance(each, SidelightError) else each[1] for each in fitted],
            targets=_targets(model, request.target, len(fitted)),
            shape=_input_shape(model, request.images),
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


Fitted = tuple[Array, Geometry | None] | SidelightError


def _fit(model: Model, images: Files | Array, *, max_pixels: int) -> list[Fitted]:
    if not isinstance(images, Files) and images.dtype != np.uint8:
        with np.errstate(over="ignore"):  # what the model's type cannot hold becomes infinite, and is refused as that
            staged = images.astype(model.staged_dtype, copy=False)
        return [_checked(each) for each in staged]
    preprocessing = model.preprocessing
    if preprocessing is None:
        raise FailedPrecondition(
            f'images: model "{model.name}" has no input size, so it takes floating arrays [N, C, H, W] alone'
        )
    if isinstance(images, Files):
        return [_decoded(preprocessing, each, max_pixels=max_pixels) for each in images.files]
    return [preprocessing.fit(each) for each in images]


def _decoded(preprocessing: Preprocessing, file: bytes, *, max_pixels: int) -> Fitted:
    try:
        return preprocessing.fit(decode(file, channels=preprocessing.channels, max_pixels=max_pixels))
    except InvalidArgument as error:
        return error


def _checked(example: Array) -> Fitted:
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(example.sum()) or np.isfinite(example).all():
            return example, None
    nan, infinite = int(np.isnan(example).sum()), int(np.isinf(example).sum())
    return InvalidArgument(f"images: {nan} NaN and {infinite} infinite elements, expected finite ones")


def _input_shape(model: Model, images: Files | Array) -> tuple[int, int, int]:
    """Return C, H, W of the model's input. `InvalidArgument` where the images have another shape."""
    preprocessing = model.preprocessing
    fixed = preprocessing and (preprocessing.channels, preprocessing.height, preprocessing.width)
    if isinstance(images, Files) or images.dtype == np.uint8:
        return fixed or (0, 0, 0)
    c, h, w = images.shape[1:]
    if fixed and (c, h, w) != fixed:
        raise InvalidArgument(
            f'images: floating arrays of {[c, h, w]}, model "{model.name}" takes [C, H, W] = {list(fixed)}; '
            "send uint8 pixels [H, W, C] or files to have them resized"
        )
    return c, h, w


def _n_examples(images: Files | Array) -> int:
    return len(images.files) if isinstance(images, Files) else len(images)


def _targets(model: Model, target: Target, n_examples: int) -> list[int | None]:
    match target:
        case Predicted():
            return [None] * n_examples
        case PerExample(choices):
            if len(choices) != n_examples:
                raise InvalidArgument(
                    f"target: {len(choices)} classes for {n_examples} examples, expected one for each"
                )
            return [model.class_of(choice) for choice in choices]
        case choice:
            return [model.class_of(choice)] * n_examples


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
