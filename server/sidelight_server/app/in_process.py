"""A module explained in this process, for callers that are not asynchronous: an engine, and an event loop of its own.

It works inside Jupyter too, where a loop runs already in the caller's thread.
"""

import asyncio
import contextlib
import inspect
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from torch import nn

from ..config.settings import Settings
from ..config.spec import ModelSpec
from ..domain import Answer, Request
from ..engine.engine import Engine
from ..errors import ConfigurationError

MAX_ROWS = 4096  # of a chunk: what a call may bring and still run as one

Shape = tuple[int, int, int]


class InProcess:
    """A module of the caller's, on its own device. Thread-safe; close it, or use `with`.

    Calls run one after the other, and each as one chunk, so that its maps are those of one pass over its batch. The
    module is neither frozen, moved nor switched; training it further shows in the next answer.

    It tries the specifications in turn, and `ConfigurationError` says what is wrong with the last.
    """

    def __init__(self, specs: Sequence[ModelSpec]) -> None:
        self._engine = _first_that_fits(specs)
        self._running = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sidelight-in-process", daemon=True)
        self._engine.start()
        self._thread.start()
        # Whoever drops the last reference may be the very thread that is to end: it only says so.
        self._dropped = weakref.finalize(self, _end_elsewhere, self._engine, self._loop, self._thread)
        self._dropped.atexit = False  # the threads are daemons

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def attribute(self, request: Request) -> Answer:
        """Return the maps of one batch. A wrong request raises a `SidelightError`; a closed object, `RuntimeError`."""
        with self._running:
            if not self._dropped.alive:
                raise RuntimeError("the engine is closed")
            answered = asyncio.run_coroutine_threadsafe(self._engine.attribute(request), self._loop)
            try:
                return answered.result()
            except BaseException:
                answered.cancel()  # of an interrupted call the rest does not run
                raise

    def close(self) -> None:
        """End after the running call. No thread is left."""
        with self._running:
            if self._dropped.detach():
                _end(self._engine, self._loop, self._thread)


def specs_of(module: nn.Module, *, image_key: str, label_key: str, trial_size: Shape) -> list[ModelSpec]:
    """Return how a module in PyHealth's manner may want to be called, the likeliest first.

    Such a module takes keywords named as its data are, and returns a dictionary whose `y_prob` is explained, even where
    logits are beside it. Any other is found out by itself. `trial_size` is C, H, W of the images.
    """
    takes_image, takes_any = _takes(module, image_key)
    calls: list[tuple[str | None, str | None]] = [(image_key, None)] if takes_image else []
    calls += [(image_key if takes_image else None, label_key)] if takes_any else []
    calls += [(None, None)]
    plain = [ModelSpec(module, input=image, label=label, trial_size=trial_size) for image, label in calls]
    return [*(replace(each, output="y_prob", outputs="probabilities") for each in plain), *plain]


def storage(module: nn.Module) -> tuple[object, ...]:
    """Return where a module's weights lie: as long as it stays the same, a replica shares them."""
    return tuple((each.data_ptr(), each.device, each.dtype) for each in (*module.parameters(), *module.buffers()))


def _takes(module: nn.Module, key: str) -> tuple[bool, bool]:
    """Say whether a module takes images by this keyword, and whether it takes any keyword at all."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # it is written in no Python
        return False, False
    kinds = inspect.Parameter
    named = [each.name for each in parameters if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    takes_any = any(each.kind is kinds.VAR_KEYWORD for each in parameters)
    known = getattr(module, "feature_keys", None)  # PyHealth's models say what they take
    if takes_any and isinstance(known, list) and known:
        return key in known, takes_any
    return key in named or (takes_any and not named), takes_any


def _device(module: nn.Module) -> str:
    device = next((each.device for each in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return str(device) if device.type == "cuda" else device.type


def _first_that_fits(specs: Sequence[ModelSpec]) -> Engine:
    settings = Settings(device=_device(specs[0].module), threads=torch.get_num_threads(), max_chunk_rows=MAX_ROWS)
    for spec in specs[:-1]:
        with contextlib.suppress(ConfigurationError):
            return _engine(spec, settings)
    return _engine(specs[-1], settings)


def _engine(spec: ModelSpec, settings: Settings) -> Engine:
    engine = _Engine([spec], settings)
    engine.expose_causes()
    for model in engine.models.values():
        model.chunk_rows = (
            MAX_ROWS  # also of a model whose rows depend on each other: they do so in the caller's batch too
        )
    return engine


class _Engine(Engine):
    """An engine of which no thread is left once it is closed."""

    def close(self, within_s: float | None = None) -> bool:
        """End after the running chunk, and after whatever is being prepared."""
        has_ended = super().close(within_s)
        for executor in (self._preparing, self._resizing):
            executor.shutdown(wait=True)
        return has_ended


def _end(engine: Engine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    engine.close()
    with contextlib.suppress(RuntimeError):  # it is closed already
        loop.call_soon_threadsafe(lambda: loop.create_task(_stop(loop)))
    thread.join()
    loop.close()


async def _stop(loop: asyncio.AbstractEventLoop) -> None:
    await loop.shutdown_default_executor()  # which has threads where a batch had many examples
    loop.stop()


def _end_elsewhere(engine: Engine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    threading.Thread(target=_end, args=(engine, loop, thread), name="sidelight-end", daemon=True).start()
