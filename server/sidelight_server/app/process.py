"""The server's process: load the models, serve until a signal, drain, stop."""

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import torch

from ..compute.host_memory import keep_freed
from ..config.settings import Settings
from ..engine.engine import Engine
from ..engine.registry.loader import loaded_event
from ..telemetry.logs import Event
from ..telemetry.tracing import from_environment
from .server import Server

log = logging.getLogger("sidelight")

METRICS = "127.0.0.1:9464"  # default address of the metrics endpoint


def load(settings: Settings) -> Engine:
    """Return an engine for the settings' models, not loaded yet, and configure torch and malloc for this process."""
    keep_freed()
    # Loading must not start OpenMP threads of its own: if a process has more of them than CPUs, GNU OpenMP sleeps at
    # every barrier instead of spinning, which made the device's thread 15 % slower.
    torch.set_num_threads(1)
    # By default torch's convolutions on a GPU round float32 to 10 bits of mantissa, an error of 0.1 % in a map.
    torch.backends.cudnn.allow_tf32 = False
    return Engine(list(settings.of_models().values()), settings, load=False)


async def serve_until_signal(engine: Engine) -> bool:
    """Serve an engine until SIGTERM or SIGINT. A second signal kills the process. SIGHUP reloads the models.

    Return False if a thread has not ended: a stuck device, or a factory that is still running.
    """
    settings = engine.settings
    server = Server(
        engine,
        listen=settings.listen,
        metrics_listen=METRICS if settings.metrics_listen is None else settings.metrics_listen,
        tracing=from_environment(),
    )
    signalled = asyncio.create_task(_wait_for_signal(on_hangup=engine.registry.reload_all))
    starting = asyncio.create_task(server.start())
    await asyncio.wait([signalled, starting], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait([starting])
        log.info(Event("stopping", signal=signalled.result(), unanswered=0, drain_s=0))
        return False
    if starting.exception():
        signalled.cancel()
    starting.result()
    engine.start_decoders()
    for model in engine.models.values():
        log.info(loaded_event(model))
    # Without the setting this is not an error: another server may use the default port.
    if settings.metrics_listen and not server.has_metrics:
        log.warning(Event("metrics_off", message=server.metrics))
    log.info(Event(
        "serving", addresses=",".join(server.addresses), models=",".join(engine.registry.entries),
        device=engine.device, threads=engine.threads, metrics=server.metrics,
    ))  # fmt: skip
    name = await signalled
    log.info(Event("stopping", signal=name, unanswered=engine.n_unanswered, drain_s=settings.drain_s))
    return await server.stop(drain_s=settings.drain_s)


async def _wait_for_signal(*, on_hangup: Callable[[], Coroutine[Any, Any, None]]) -> str:
    """Wait for SIGTERM or SIGINT and return its name. SIGHUP calls `on_hangup`."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    names: list[str] = []
    reloading: set[asyncio.Task[None]] = set()  # the loop only keeps weak references to tasks

    def reload() -> None:
        reloading.add(task := loop.create_task(on_hangup()))
        task.add_done_callback(reloading.discard)

    loop.add_signal_handler(signal.SIGHUP, reload)

    def handle(name: str, number: int) -> None:
        names.append(name)
        came.set()
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handle, number.name, number)
    await came.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
    return names[0]
