"""Engines in Ray's processes: with the CPUs that Ray has assigned, and for threads that wait."""

import asyncio
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import ray
from torch import nn

from ..app.embedded import create_engine
from ..config.spec import ModelSpec
from ..engine.engine import Engine

_Value = TypeVar("_Value")


def assigned_engine(model: nn.Module | ModelSpec | str | None, settings: Mapping[str, Any], where: str) -> Engine:
    """Return an engine whose `threads` default to the CPUs of this actor, or as `create_engine` does outside of one."""
    assigned = ray.get_runtime_context().get_assigned_resources() if ray.is_initialized() else {}
    return create_engine(model, {"threads": int(assigned.get("CPU", 0)), **settings}, where)


class BlockingEngine:
    """Runs an engine, warmed up, until the process ends. `wait` may be called on any number of threads at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="sidelight-ray", daemon=True).start()
        engine.start()
        self.wait(engine.warm_up())

    def wait(self, task: Coroutine[Any, Any, _Value]) -> _Value:
        """Run a coroutine on the engine's event loop and return its result."""
        return asyncio.run_coroutine_threadsafe(task, self._loop).result()
