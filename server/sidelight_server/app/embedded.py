"""A server in a thread of the caller's process: for tests, notebooks and embedding."""

import asyncio
import atexit
import contextlib
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from ..config.faults import first_fault
from ..config.model_settings import ModelSettings
from ..config.settings import Settings
from ..config.spec import ModelSpec
from ..engine.engine import Engine
from ..errors import ConfigurationError
from .server import Server


class EmbeddedServer:
    """A server that `serve` has started. It runs until `close`, the end of a `with` block, or the process's end.

    `with` gives the address.
    """

    def __init__(
        self, server: Server, folder: tempfile.TemporaryDirectory[str], resources: contextlib.ExitStack
    ) -> None:
        self.address = server.addresses[0]
        self._server = server
        self._folder = folder
        self._resources = resources  # its thread, and that folder
        atexit.register(self._abandon)

    def __enter__(self) -> str:
        return self.address

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.address}>"

    def close(self) -> None:
        """Let running calls end within `drain_s`, then stop. A second call does nothing."""
        atexit.unregister(self._abandon)
        self._resources.close()

    def _abandon(self) -> None:
        """Release resources that outlive the process. A stop would need new threads, which cannot start at exit."""
        self._server.abandon()
        self._folder.cleanup()


def serve(model: nn.Module | ModelSpec | str | None = None, **settings: Any) -> EmbeddedServer:
    """Start a server in a thread of this process, on a new UNIX socket. It is ready when this returns.

    `model` is a module, a `ModelSpec` or a source; for several models pass `models={name: {"model": source, …}}`
    instead. `settings` are the fields of `Settings`; environment variables and the settings file are not read. The
    module is not changed. `threads` defaults to `torch.get_num_threads()` of the calling thread.

    OpenMP belongs to the whole process: if other processes use the same cores, set `GOMP_SPINCOUNT=1000` in the
    environment before importing torch, as `sidelight-server` does. `dedicated_cpus` has no effect here.
    """
    engine = create_engine(model, settings, where="serve()")
    chosen = engine.settings
    if "listen" not in settings:  # the socket is in a private folder, so callers are of this user
        engine.expose_causes()
    with contextlib.ExitStack() as resources:
        folder = tempfile.TemporaryDirectory(prefix="sidelight-")
        resources.enter_context(folder)
        listen = chosen.listen if "listen" in settings else (f"unix:{folder.name}/socket",)
        server = Server(engine, listen=listen, metrics_listen=chosen.metrics_listen or "")
        resources.enter_context(_Thread(server, drain_s=chosen.drain_s))
        return EmbeddedServer(server, folder, resources.pop_all())


def create_engine(model: nn.Module | ModelSpec | str | None, settings: Mapping[str, Any], where: str) -> Engine:
    """Return an engine with its models loaded. `settings` are keywords that a caller has passed to `where`.

    `threads` defaults to `torch.get_num_threads()`. Raises `ConfigurationError`.
    """
    try:
        chosen = Settings(**settings)
    except ValidationError as error:
        raise ConfigurationError(first_fault(error, known=Settings.model_fields, where=where)) from None
    if not chosen.threads:
        chosen = chosen.model_copy(update={"threads": torch.get_num_threads()})
    return Engine(_offered(model, chosen), chosen)


def _offered(model: nn.Module | ModelSpec | str | None, settings: Settings) -> list[ModelSpec | ModelSettings]:
    if isinstance(model, str):
        settings = settings.model_copy(update={"model": model})
    elif model is not None:
        return [model if isinstance(model, ModelSpec) else ModelSpec(module=model)]
    return list(settings.of_models().values())


class _Thread:
    """A server's event loop in a thread."""

    def __init__(self, server: Server, *, drain_s: float) -> None:
        self._server = server
        self._drain_s = drain_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sidelight-server", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()
        try:
            # No timeout: compiling or a large model may take long, and Ctrl-C interrupts the wait.
            asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result()
        except BaseException:
            self._server.abandon()
            self._end()
            raise

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._server.stop(drain_s=self._drain_s), self._loop).result()
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
