"""Explains a module in this process through a synchronous interface: an engine with its own event loop.

It also works in Jupyter, where an event loop already runs in the caller's thread.
"""

import asyncio
import contextlib
import inspect
import threading
import weakref
from collections.abc import Sequence
from typing import Self

import torch
from torch import nn

from ..config.settings import Settings
from ..config.spec import ModelSpec
from ..domain import Answer, Request
from ..engine.engine import Engine
from ..errors import ConfigurationError

MAX_ROWS = 4096  # largest batch that runs as one chunk

Shape = tuple[int, int, int]


class InProcess:
    """Explains a module of the caller on the module's device. Thread-safe; close it, or use `with`.

    Calls run one after the other, each as one chunk, so that its maps are those of a single pass over the batch. The
    module is not changed; further training of it shows in the next answer.

    The first of `specs` that works is used. Raises the `ConfigurationError` of the last if none does.
    """

    def __init__(self, specs: Sequence[ModelSpec]) -> None:
        self._engine = _first_that_fits(specs)
        self._running = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sidelight-in-process", daemon=True)
        self._engine.start()
        self._thread.start()
        # The last reference may be dropped on one of these threads, so another thread ends them.
        self._dropped = weakref.finalize(self, _end_elsewhere, self._engine, self._loop, self._thread)
        self._dropped.atexit = False  # the threads are daemons

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def attribute(self, request: Request) -> Answer:
        """Return the maps of one batch. Raises `SidelightError`, or `RuntimeError` once closed."""
        with self._running:
            if not self._dropped.alive:
                raise RuntimeError("the engine is closed")
            answered = asyncio.run_coroutine_threadsafe(self._engine.attribute(request), self._loop)
            try:
                return answered.result()
            except BaseException:
                answered.cancel()  # drop the remaining rows of an interrupted call
                raise

    def close(self) -> None:
        """Close after the running call, and join all threads."""
        with self._running:
            if self._dropped.detach():
                _end(self._engine, self._loop, self._thread)


def specs_of(module: nn.Module, *, image_key: str, label_key: str, trial_size: Shape) -> list[ModelSpec]:
    """Return specs for the ways to call a PyHealth module, the most likely first.

    Such a module takes keywords named after its data, and returns a dictionary whose `y_prob` is explained even if it
    has logits too. Other modules are detected by introspection. `trial_size` is C, H, W of the images.
    """
    takes_image, takes_any = _takes(module, image_key)
    calls: list[tuple[str | None, str | None]] = [(image_key, None)] if takes_image else []
    calls += [(image_key if takes_image else None, label_key)] if takes_any else []
    calls += [(None, None)]
    plain = [
        ModelSpec(module=module, input=image, label_argument=label, trial_size=trial_size) for image, label in calls
    ]
    return [*(each.replace(output_key="y_prob", output_kind="probabilities") for each in plain), *plain]


def storage(module: nn.Module) -> tuple[object, ...]:
    """Return addresses, devices and types of a module's tensors: while they are equal, a replica shares them."""
    return tuple((each.data_ptr(), each.device, each.dtype) for each in (*module.parameters(), *module.buffers()))


def _takes(module: nn.Module, key: str) -> tuple[bool, bool]:
    """Return whether a module takes images by this keyword, and whether it accepts any keyword."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return False, False
    kinds = inspect.Parameter
    named = [each.name for each in parameters if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    takes_any = any(each.kind is kinds.VAR_KEYWORD for each in parameters)
    known = getattr(module, "feature_keys", None)  # the keywords that a PyHealth model takes
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
    engine = Engine([spec], settings)
    engine.expose_causes()
    for model in engine.models.values():
        # Also for a model whose rows depend on each other: they do so in the caller's batch too.
        model.chunk_rows = MAX_ROWS
    return engine


def _end(engine: Engine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    engine.close(waits_for_preparation=True)
    with contextlib.suppress(RuntimeError):  # the loop is already closed
        loop.call_soon_threadsafe(lambda: loop.create_task(_stop(loop)))
    thread.join()
    loop.close()


async def _stop(loop: asyncio.AbstractEventLoop) -> None:
    await loop.shutdown_default_executor()  # used for batches with many examples
    loop.stop()


def _end_elsewhere(engine: Engine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    threading.Thread(target=_end, args=(engine, loop, thread), name="sidelight-end", daemon=True).start()
