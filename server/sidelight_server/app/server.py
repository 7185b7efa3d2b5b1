"""The server's life cycle: start, serve until a signal, drain, stop."""

import asyncio
import contextlib
import functools
import logging
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sidelight.v1 import attribution_pb2_grpc, model_pb2_grpc

from ..compute.host_memory import keep_freed
from ..config.settings import Settings
from ..engine.engine import Engine
from ..engine.recalibration import Recalibration
from ..engine.registry import loaded_event
from ..engine.reloader import Reloader
from ..rpc.handler import RequestHandler
from ..rpc.interceptors import MessageInterceptor
from ..rpc.log_filter import hide_failed_writes
from ..rpc.receive_limit import Pace
from ..rpc.service import AttributionService, ModelService
from ..rpc.shared_memory import SharedMemory
from ..rpc.status import refusing
from ..rpc.write_timeout import WriteTimeout
from ..security.authorization import Authorization, Callers
from ..security.tls import Certificates
from ..telemetry.logs import Event
from ..telemetry.recorder import Telemetry
from ..telemetry.tracing import Tracing, from_environment
from .addresses import bind
from .health import SERVICES, Health, ReadinessGate, statuses
from .load_shedding import LoadShedding
from .reflection import enable_reflection
from .watchdog import Watchdog

if TYPE_CHECKING:
    from ..security.reloadable_files import SecretFiles
    from .metrics_http import MetricsServer

log = logging.getLogger("sidelight")

METRICS = "127.0.0.1:9464"  # where a process tells them if nobody says otherwise

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

# Callers may ping every 10 s. Pings arrive early by a jitter, and the third one that does would end the connection.
MIN_PING_INTERVAL_MS = 5_000
KEEPALIVE_TIMEOUT_S = 10.0  # for an answer to a ping

# Calls of one connection at once; a caller's further ones wait with the caller. It also bounds what a connection costs
# whose calls are begun and reset as fast as can be.
MAX_CONNECTION_CALLS = 100

TELLING_S = 1.0  # of `drain_s`, and at most a tenth of it, for telling callers that it has passed
CHUNK_S = 5.0  # that the running chunk may take once all callers are gone


class Server:
    """An engine on the network. `ConfigurationError` where an address cannot be had."""

    def __init__(
        self,
        engine: Engine,
        *,
        listen: Sequence[str],
        plaintext: bool = False,
        metrics_listen: str = "",
        tracing: Tracing | None = None,
    ) -> None:
        self._engine = engine
        self._listen = listen
        self._plaintext = plaintext
        self._health = Health()
        self._is_stopping = False
        self._shared: SharedMemory | None = None
        self._watching: list[asyncio.Task[None]] = []
        self._metrics_listen = metrics_listen
        self._metrics: MetricsServer | None = None
        self._tracing = tracing
        self.handler = RequestHandler(engine, Telemetry(tracing))
        self._gate = ReadinessGate(self.handler.telemetry.counts)
        self.addresses: list[str] = []
        self.metrics = "none"  # where they are told, or why not

    async def start(self) -> None:
        """Bind, and answer for health; load, warm up, and begin to answer. `addresses` then says where."""
        await self._open()
        try:
            await self._engine.registry.loaded()
            self._engine.start()
            await self._engine.warm_up()
        except BaseException:
            await self._server.stop(0)
            raise
        self._gate.is_open = True
        self._tell()
        settings = self._engine.settings
        self._reloader(Recalibration(self._engine.registry, self._engine.devices).run())
        if settings.watch_s:
            self._reloader(Reloader(self._engine.registry, every_s=settings.watch_s).run())
        if settings.stuck_s:
            self._reloader(Watchdog(self._engine, on_look=self._tell).run())
        shedding = LoadShedding(self._service.end_waiting, max_message_bytes=settings.max_message_bytes)
        self._reloader(shedding.run())

    async def _open(self) -> None:
        settings = self._engine.settings
        if settings.shared_memory:
            self._shared = SharedMemory(
                settings.shared_memory,
                max_region_bytes=settings.max_region_bytes,
                max_stream_regions=settings.max_stream_regions,
            )
        hide_failed_writes()
        loop = asyncio.get_running_loop()
        authorization = Authorization(settings, functools.partial(refusing, counts=self.handler.telemetry.counts))
        callers = Callers(settings)
        write_timeout = WriteTimeout(within_s=settings.stalled_write_s)
        write_timeout.watch(loop)
        pace = Pace()
        self._interceptor = MessageInterceptor(callers, write_timeout, pace, max_arrival_s=settings.max_arrival_s)
        self._server = grpc.aio.server(
            interceptors=[authorization, self._gate, self._interceptor], options=_options(settings)
        )
        self._service = AttributionService(
            self._engine, self.handler, self._shared, callers=callers, write_timeout=write_timeout, pace=pace
        )
        attribution_pb2_grpc.add_AttributionServiceServicer_to_server(self._service, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(self._engine), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        enable_reflection(self._server, (*SERVICES, HEALTH))
        certificates = Certificates.of(settings)
        self.addresses = [
            bind(
                self._server,
                address,
                plaintext=self._plaintext,
                certificates=certificates,
                socket_mode=settings.socket_mode,
            )
            for address in self._listen
        ]
        self._expose([*authorization.files, *(certificates.files if certificates else ())])
        self._engine.on_change = lambda: _call_soon(loop, self._tell)
        self._tell()
        await self._server.start()

    @property
    def has_metrics(self) -> bool:
        """Whether metrics are told."""
        return self._metrics is not None

    def _expose(self, files: "Sequence[SecretFiles[Any]]") -> None:
        """Tell metrics. An address that cannot be had is said, no more: nobody is to go without maps for that."""
        if not self._metrics_listen:
            return
        # Not before: they take 30 ms, and most tests do without.
        from .metrics_http import MetricsServer
        from .prometheus import Metrics

        metrics = Metrics(self._engine, self.handler, self._service, files)
        try:
            self._metrics = MetricsServer(metrics, self._metrics_listen, plaintext=self._plaintext)
            self.metrics = self._metrics.address
        except OSError as error:
            self.metrics = f"none: {self._metrics_listen}: {error.strerror}"

    async def stop(self, *, drain_s: float) -> bool:
        """Take nothing new in, let running work end within `drain_s`, and stop. False where a device is left stuck."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + drain_s
        for task in self._watching:
            task.cancel()
        self._is_stopping = True
        self._tell()
        self._health.close()
        self._engine.registry.close()
        self._service.drain()
        # What is not answered then is told so, instead of being cut off.
        telling_s = min(TELLING_S, drain_s / 10)
        giving_up = loop.call_at(until_s - telling_s, self._service.give_up)
        await self._server.stop(drain_s)
        giving_up.cancel()
        is_stuck = any(device.worker.heartbeat.is_stuck for device in self._engine.devices)
        within_s = 0.0 if is_stuck else max(CHUNK_S, until_s - loop.time())
        has_ended = await asyncio.to_thread(self._close, within_s)
        if self._tracing:
            await asyncio.to_thread(self._tracing.close, max(TELLING_S / 2, until_s - loop.time()))
        return has_ended

    def abandon(self) -> None:
        """End what a start that failed has begun."""
        self._close()

    def _close(self, within_s: float | None = None) -> bool:
        has_ended = self._engine.close(within_s)
        if self._metrics:
            self._metrics.close()
            self._metrics = None
        if self._shared:
            self._shared.close()
            self._shared = None
        if not has_ended:
            log.error(Event("device_abandoned", device=self._engine.device))
        return has_ended

    def _tell(self) -> None:
        self._health.set(statuses(self._engine, serves=self._gate.is_open and not self._is_stopping))

    def _reloader(self, watching: Coroutine[Any, Any, None]) -> None:
        self._watching.append(asyncio.create_task(watching))


def _call_soon(loop: asyncio.AbstractEventLoop, loaded_event: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(loaded_event)


def _options(settings: Settings) -> list[tuple[str, int]]:
    """Return what gRPC is told."""
    options = [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        # Two servers on one port would each get a share of the calls, and nobody would know.
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", MAX_CONNECTION_CALLS),
        # Otherwise the 64 KiB that come of a message nobody reads become as much as the network holds.
        ("grpc.http2.bdp_probe", 0),
        # With or without a call, to find out whether this server is there.
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if settings.keepalive_s:
        timeout_ms = round(1000 * min(settings.keepalive_s, KEEPALIVE_TIMEOUT_S))
        options += [
            ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", timeout_ms),
            # Without this one a dead caller was seen to be kept for a minute more.
            ("grpc.http2.ping_timeout_ms", timeout_ms),
            ("grpc.http2.max_pings_without_data", 0),  # as many as it takes
        ]
    return options


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
