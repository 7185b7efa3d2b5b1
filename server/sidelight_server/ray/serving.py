"""The unary service on Ray Serve, behind Serve's gRPC proxy, with the same schema.

Serve chooses the number of replicas, checks their health, and reloads the model when `user_config` changes.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2

from ..app.health.health import statuses
from ..engine.engine import Engine
from ..errors import SidelightError, Unavailable
from ..rpc.request_handler import RequestHandler
from ..rpc.servicers import models, server_info
from ..rpc.status import STATUSES, retry_trailers
from ..wire import responses
from .engines import assigned_engine

ONGOING = 8  # requests of one replica that the autoscaler aims at: their rows share chunks
MAX_ONGOING = 64  # limit of one replica; more requests wait in Serve's proxy
MAX_REPLICAS = 4


class Generation:
    """One engine and the calls that began while it served. Once it is retired, it is closed when these have ended."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.handler = RequestHandler(engine)
        self._n_calls = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Hold the engine for a call."""
        self._n_calls += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._n_calls -= 1
            if not self._n_calls:
                self._is_idle.set()

    async def retire(self) -> None:
        """Close the engine after its calls. No new call may begin."""
        await self._is_idle.wait()
        await asyncio.to_thread(self.engine.close)


class Sidelight:
    """A replica. `user_config` has `model` and settings of the server; a change of it loads the model again.

    Its methods are those of `sidelight.v1` whose calls are unary. `revision` may be anything: a new value loads changed
    files again. Tokens and TLS are Serve's: settings that concern the network are not used.
    """

    def __init__(self) -> None:
        self._generation: Generation | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the model of a new configuration, then serve it. Serve calls this before the first request."""
        settings = {name: value for name, value in user_config.items() if name != "revision"}
        engine = await asyncio.to_thread(assigned_engine, None, settings, "user_config")
        engine.start()
        await engine.warm_up()
        before, self._generation = self._generation, Generation(engine)
        if before:
            await before.retire()

    def check_health(self) -> None:
        """Raise `Unavailable` if the device is lost or stuck: Serve then replaces the replica."""
        if not statuses(self._serving.engine, serves=True)[""]:
            raise Unavailable("the device is lost or stuck")

    async def Attribute(  # noqa: N802
        self, request: pb.AttributeRequest, grpc_context: RayServegRPCContext
    ) -> pb.AttributeResponse:
        generation = self._serving
        handler = generation.handler
        record = handler.telemetry.begin("Attribute", grpc_context.invocation_metadata, caller=grpc_context.peer())
        try:
            with generation.call():
                validated = await handler.validate(request, n_bytes=request.ByteSize(), call_record=record)
                with await handler.acquire_unary_permits(validated):
                    return pb.AttributeResponse.FromString(await handler.explain(validated))
        except SidelightError as error:
            handler.telemetry.failed(record, error)
            _set_status(grpc_context, error)
            raise
        finally:
            handler.telemetry.end(record)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:  # noqa: N802
        return server_info(self._serving.engine)

    async def ListModels(self, request: model_pb2.ListModelsRequest) -> model_pb2.ListModelsResponse:  # noqa: N802
        return model_pb2.ListModelsResponse(models=models(self._serving.engine))

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, grpc_context: RayServegRPCContext
    ) -> model_pb2.GetModelResponse:
        engine = self._serving.engine
        try:
            entry = engine.registry.find(request.name)
        except SidelightError as error:
            _set_status(grpc_context, error)
            raise
        return model_pb2.GetModelResponse(model=responses.model_info(engine, entry, whole=True))

    @property
    def _serving(self) -> Generation:
        if self._generation is None:
            raise Unavailable("user_config: none; expected at least a model")
        return self._generation


def app(user_config: dict[str, Any]) -> serve.Application:
    """Return the application: `serve run sidelight_server.ray:app model=hf:DIR`, or the import path of a configuration.

    In a configuration, `user_config` and all of Serve's own options are those of the deployment `Sidelight`.
    """
    deployment = serve.deployment(
        Sidelight,
        user_config=user_config or None,
        max_ongoing_requests=MAX_ONGOING,
        autoscaling_config={"min_replicas": 1, "max_replicas": MAX_REPLICAS, "target_ongoing_requests": ONGOING},
    )
    return deployment.bind()


def _set_status(context: RayServegRPCContext, error: SidelightError) -> None:
    context.set_code(STATUSES[error.code])
    context.set_details(error.message)
    context.set_trailing_metadata([*context.trailing_metadata(), *retry_trailers(error)])
