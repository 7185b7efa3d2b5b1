"""Health checking by `grpc.health.v1` for the server and each model, and the gate for calls before readiness.

Names: "" and the services for the server, "model/NAME" for each model. The server is SERVING from the end of its
warm-up until it begins to stop, while at least one device's worker makes progress. A model is SERVING while the server
is and a version of it is loaded; a lazy model only after its first request.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sidelight.v1 import attribution_pb2, model_pb2

from ...engine.engine import Engine
from ...errors import ResourceExhausted, Unavailable
from ...interop.open_inference import service as open_inference
from ...rpc.status import Context, abort, rejecting_handler
from ...security.authorization import INFERENCE_PROBES
from ...security.stream_limit import Peers
from ...telemetry.counters import Counters

SERVICES = (
    attribution_pb2.DESCRIPTOR.services_by_name["AttributionService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    open_inference.SERVICE,
)
MODEL = open_inference.MODEL
OPEN = ("/grpc.health.v1.", "/grpc.reflection.")  # services that are available before the server is ready
RETRY_DELAY_S = 1.0
MAX_PEER_WATCHES = 64  # open at once from one host
MAX_WATCHES = 1024

_Status = health_pb2.HealthCheckResponse
if TYPE_CHECKING:
    from ...rpc.status import Handler


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """`grpc.health.v1.Health`. Used on the event loop only.

    The servicer of grpcio-health-checking would keep every Watch open during a stop, until `drain_s` has passed.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._watchers: set[asyncio.Event] = set()
        self._peers = Peers("Watches", each=MAX_PEER_WATCHES, all_=MAX_WATCHES)
        self._is_closed = False

    @property
    def n_watches(self) -> int:
        return len(self._watchers)

    def set(self, statuses: Mapping[str, bool]) -> None:
        """Set whether each name serves. All other names are unknown."""
        new = {name: _Status.SERVING if serves else _Status.NOT_SERVING for name, serves in statuses.items()}
        if new != self._statuses:
            self._statuses = new
            self._wake()

    def serves(self, name: str) -> bool:
        return bool(self._statuses.get(name) == _Status.SERVING)

    def close(self) -> None:
        """End every Watch after it has sent the last status."""
        self._is_closed = True
        self._wake()

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        if (status := self._statuses.get(request.service)) is None:
            # Does not list the known names: health needs no token, and names of models are not public.
            await context.abort(grpc.StatusCode.NOT_FOUND, 'service: unknown; expected "", a service, or model/NAME')
        return _Status(status=status)

    # Writes to the context instead of yielding, so that `finally` runs as soon as the client disconnects.
    async def Watch(self, request: Any, context: Context) -> None:  # noqa: N802
        """Write the status of a name, and again after each change."""
        try:
            with self._peers.opens(context.peer()):
                await self._watch(request.service, context)
        except ResourceExhausted as error:
            await abort(context, error)

    async def _watch(self, name: str, context: Context) -> None:
        sent: int | None = None
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                status = self._statuses.get(name, _Status.SERVICE_UNKNOWN)
                if status != sent:
                    sent = status
                    await context.write(_Status(status=status))
                elif self._is_closed:
                    return
                else:
                    await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()


def statuses(engine: Engine, *, serves: bool) -> dict[str, bool]:
    """Return for each name whether it serves. `serves`: whether the server is ready and not draining."""
    serves = serves and any(device.is_responsive for device in engine.devices)
    models = {MODEL + entry.name: serves and bool(entry.models) for entry in engine.registry.entries.values()}
    return dict.fromkeys(("", *SERVICES), serves) | models


class ReadinessGate(grpc.aio.ServerInterceptor):
    """Rejects calls until the server is ready, so that health checks work while models load."""

    def __init__(self, counters: Counters) -> None:
        self.is_open = False
        self._counters = counters

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the call's handler, or one that rejects it with UNAVAILABLE."""
        method = handler_call_details.method
        if self.is_open or method.startswith(OPEN) or method in INFERENCE_PROBES:
            return await continuation(handler_call_details)
        starting = Unavailable("the server is starting: its models are not loaded yet", retry_delay_s=RETRY_DELAY_S)
        return rejecting_handler(starting, self._counters)
