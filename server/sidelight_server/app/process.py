"""The server's process: load the models, serve until a signal, drain, stop."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import torch

from ..compute.host_memory import keep_freed
from ..config.settings import Settings
from ..engine.engine import Engine
from ..engine.loader import loaded_event
from ..telemetry.logs import Event
from ..telemetry.tracing import from_environment
from .server import Server

if TYPE_CHECKING:
    pass


import logging

log = logging.getLogger("sidelight")

METRICS = "127.0.0.1:9464"  # where a process tells them if nobody says otherwise


def load(settings: Settings) -> Engine:
    """Return an engine on the models that the settings name, not loaded, in a process that is this server's own."""
    keep_freed()
    # Loading must not start OpenMP workers of its own: once a process has more of them than CPUs, GNU's OpenMP sleeps
    # at every barrier instead of spinning, and the thread that owns the device was seen to lose 15 % by it.
    torch.set_num_threads(1)
    # torch lets a GPU's convolutions round float32 to 10 bits of mantissa; a map would be off by a thousandth.
    torch.backends.cudnn.allow_tf32 = False
    return Engine(list(settings.of_models().values()), settings, load=False)


async def serve_until_signal(engine: Engine) -> bool:
    """Serve an engine until SIGTERM or SIGINT. A second signal ends at once. SIGHUP has the models loaded again.

    False where something does not end by itself: a device that is stuck, a factory that takes its time.
    """
    settings = engine.settings
    server = Server(
        engine,
        listen=settings.listen,
        plaintext=settings.plaintext,
        metrics_listen=METRICS if settings.metrics_listen is None else settings.metrics_listen,
        tracing=from_environment(),
    )
    signalled = asyncio.create_task(_signalled(on_hangup=engine.registry.reload_all))
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
    # By default it is no fault: another server may have the port.
    if settings.metrics_listen and not server.has_metrics:
        log.warning(Event("metrics_off", message=server.metrics))
    log.info(Event(
        "serving", addresses=",".join(server.addresses), models=",".join(engine.registry.entries),
        device=engine.device, threads=engine.threads, metrics=server.metrics,
    ))  # fmt: skip
    name = await signalled
    log.info(Event("stopping", signal=name, unanswered=engine.n_unanswered, drain_s=settings.drain_s))
    return await server.stop(drain_s=settings.drain_s)


async def _signalled(*, on_hangup: Callable[[], Coroutine[Any, Any, None]]) -> str:
    """Return the name of the signal to stop that came. SIGHUP has the models loaded again meanwhile."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    names: list[str] = []
    reloading: set[asyncio.Task[None]] = set()  # the loop itself keeps no task alive

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
