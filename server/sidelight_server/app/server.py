"""The server's life cycle: start, serve until a signal, drain, stop."""

import asyncio
import functools
import logging
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sidelight.v1 import attribution_pb2_grpc, model_pb2_grpc

from ..engine.completion import call_soon
from ..engine.engine import Engine
from ..engine.registry.recalibration import recalibrate
from ..engine.registry.reloader import Reloader
from ..interop.open_inference.service import DECODERS as INFERENCE_DECODERS
from ..interop.open_inference.service import InferenceService
from ..interop.open_inference.shared_memory import SystemSharedMemory
from ..rpc.interceptors import DECODERS, MessageInterceptor
from ..rpc.limits.receive_limit import Pace
from ..rpc.limits.write_timeout import WriteTimeout
from ..rpc.log_filter import hide_failed_writes
from ..rpc.open_calls import OpenCalls
from ..rpc.request_handler import RequestHandler
from ..rpc.servicers import AttributionService, ModelService
from ..rpc.shared_memory import SharedMemory
from ..rpc.status import rejecting_handler
from ..security.authorization import Authorization, Callers
from ..security.tls import Certificates
from ..telemetry.logs import Event
from ..telemetry.recorder import Telemetry
from ..telemetry.tracing import Tracing
from .addresses import bind
from .channel_options import channel_options
from .health.health import SERVICES, Health, ReadinessGate, statuses
from .health.watchdog import Watchdog
from .load_shedding import LoadShedding
from .metrics.counts import ServerCounts
from .reflection import enable_reflection

if TYPE_CHECKING:
    from ..security.reloadable_files import SecretFiles
    from .metrics.metrics_http import MetricsServer

log = logging.getLogger("sidelight")

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
STATUS_S = 1.0  # last part of `drain_s`, at most a tenth of it, in which unanswered calls get their status
CHUNK_S = 5.0  # limit for the running chunk after all calls have ended


class Server:
    """A gRPC server for an engine. `start` raises `ConfigurationError` if an address cannot be bound."""

    def __init__(
        self,
        engine: Engine,
        *,
        listen: Sequence[str],
        metrics_listen: str = "",
        tracing: Tracing | None = None,
    ) -> None:
        self._engine = engine
        self._listen = listen
        self._health = Health()
        self._is_stopping = False
        self._shared: SharedMemory | None = None
        self._regions = SystemSharedMemory(None)
        self._background: list[asyncio.Task[None]] = []
        self._metrics_listen = metrics_listen
        self._metrics: MetricsServer | None = None
        self._tracing = tracing
        self.handler = RequestHandler(engine, Telemetry(tracing))
        self._gate = ReadinessGate(self.handler.telemetry.counters)
        self.addresses: list[str] = []
        self.metrics = "none"  # address of the metrics endpoint, or why there is none

    async def start(self) -> None:
        """Bind `addresses` and serve health checks; load and warm up the models; then serve all calls."""
        await self._open()
        try:
            await self._engine.registry.ensure_loaded()
            self._engine.start()
            await self._engine.warm_up()
        except BaseException:
            await self._server.stop(0)
            raise
        self._gate.is_open = True
        self._update_health()
        settings = self._engine.settings
        self._run_in_background(recalibrate(self._engine.registry, self._engine.devices))
        if settings.watch_s:
            self._run_in_background(Reloader(self._engine.registry, every_s=settings.watch_s).run())
        if settings.stuck_s:
            self._run_in_background(Watchdog(self._engine, on_check=self._update_health).run())
        shedding = LoadShedding(self.calls.end_waiting, max_message_bytes=settings.max_message_bytes)
        self._run_in_background(shedding.run())
        if self._regions.is_allowed:
            self._run_in_background(self._regions.sweep_forever())

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
        authorization = Authorization(
            settings, functools.partial(rejecting_handler, counters=self.handler.telemetry.counters)
        )
        callers = Callers(settings)
        write_timeout = WriteTimeout(within_s=settings.stalled_write_s)
        write_timeout.watch(loop)
        pace = Pace()
        self._interceptor = MessageInterceptor(
            callers,
            write_timeout,
            pace,
            max_arrival_s=settings.max_arrival_s,
            decoders={**DECODERS, **INFERENCE_DECODERS},
        )
        self._server = grpc.aio.server(
            interceptors=[authorization, self._gate, self._interceptor], options=channel_options(settings)
        )
        self.calls = OpenCalls(self.handler, callers=callers, write_timeout=write_timeout, pace=pace, settings=settings)
        self._add_services(self._server, callers)
        certificates = Certificates.of(settings)
        self.addresses = [
            bind(
                self._server,
                address,
                plaintext=settings.plaintext,
                certificates=certificates,
                socket_mode=settings.socket_mode,
            )
            for address in self._listen
        ]
        self._expose([*authorization.files, *(certificates.files if certificates else ())])
        self._engine.on_change = functools.partial(call_soon, loop, self._update_health)
        self._update_health()
        await self._server.start()

    def _add_services(self, server: grpc.aio.Server, callers: Callers) -> None:
        service = AttributionService(self._engine, self.handler, self.calls, self._shared)
        attribution_pb2_grpc.add_AttributionServiceServicer_to_server(service, server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(self._engine), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self._regions = SystemSharedMemory(self._shared)
        inference = InferenceService(
            self._engine, self.handler, self.calls, self._regions, callers=callers, serves=self._health.serves
        )
        server.add_generic_rpc_handlers((inference.handlers(),))
        enable_reflection(server, (*SERVICES, HEALTH))

    def counts(self) -> ServerCounts:
        """Return the current counts. Called once the server is started, on any thread."""
        engine, admission, calls = self._engine, self.handler.admission, self.calls
        return ServerCounts(
            permits=admission.n_requests,
            permit_bytes=admission.n_bytes,
            waiting=admission.n_waiting,
            arriving=self._interceptor.n_arriving,
            unary_calls=calls.n_unary,
            streams=calls.n_streams,
            unanswered=calls.n_unanswered,
            requests=engine.n_unanswered,
            rows=sum(device.n_rows for device in engine.devices),
            watches=self._health.n_watches,
            shed_streams=calls.n_shed,
        )

    @property
    def has_metrics(self) -> bool:
        return self._metrics is not None

    def _expose(self, files: "Sequence[SecretFiles[Any]]") -> None:
        """Start the metrics endpoint. If its address cannot be bound, only record why: the server works without it."""
        if not self._metrics_listen:
            return
        # Imported here: they take 30 ms, and most tests do not need them.
        from .metrics.metrics_http import MetricsServer
        from .metrics.prometheus import Metrics

        metrics = Metrics(self._engine, self.handler.telemetry.counters, self.counts, files)
        try:
            self._metrics = MetricsServer(metrics, self._metrics_listen, plaintext=self._engine.settings.plaintext)
            self.metrics = self._metrics.address
        except OSError as error:
            self.metrics = f"none: {self._metrics_listen}: {error.strerror}"

    async def stop(self, *, drain_s: float) -> bool:
        """Stop reading, let running work end within `drain_s`, and stop. Return False if a worker has not ended."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + drain_s
        for task in self._background:
            task.cancel()
        self._is_stopping = True
        self._update_health()
        self._health.close()
        self._engine.registry.close()
        self.calls.drain()
        # Unanswered calls get a status shortly before `drain_s` ends, instead of being cut off.
        status_s = min(STATUS_S, drain_s / 10)
        timer = loop.call_at(until_s - status_s, self.calls.give_up)
        await self._server.stop(drain_s)
        timer.cancel()
        is_stuck = any(device.worker.heartbeat.is_stuck for device in self._engine.devices)
        within_s = 0.0 if is_stuck else max(CHUNK_S, until_s - loop.time())
        has_ended = await asyncio.to_thread(self._close, within_s)
        if self._tracing:
            await asyncio.to_thread(self._tracing.close, max(STATUS_S / 2, until_s - loop.time()))
        return has_ended

    def abandon(self) -> None:
        """Release everything after a failed start."""
        self._close()

    def _close(self, within_s: float | None = None) -> bool:
        has_ended = self._engine.close(within_s)
        if self._metrics:
            self._metrics.close()
            self._metrics = None
        self._regions.close()
        if self._shared:
            self._shared.close()
            self._shared = None
        if not has_ended:
            log.error(Event("device_abandoned", device=self._engine.device))
        return has_ended

    def _update_health(self) -> None:
        self._health.set(statuses(self._engine, serves=self._gate.is_open and not self._is_stopping))

    def _run_in_background(self, task: Coroutine[Any, Any, None]) -> None:
        self._background.append(asyncio.create_task(task))
