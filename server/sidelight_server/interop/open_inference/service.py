"""The service: the calls of `inference.GRPCInferenceService`."""

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import Message

from ...engine.engine import Engine
from ...engine.registry.entry import Entry
from ...errors import NotFound, SidelightError
from ...rpc.open_calls import OpenCalls
from ...rpc.request_handler import RequestHandler
from ...rpc.status import Context, abort
from ...security.authorization import Callers
from ...wire.codec import Decoded
from . import inference_pb2 as oip
from . import metadata
from .handler import InferHandler, decode
from .shared_memory import SystemSharedMemory
from .stream import InferStream

DESCRIPTOR = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE: str = DESCRIPTOR.full_name
DECODERS = {oip.ModelInferRequest.FromString: decode}
MODEL = "model/"  # prefix of a model's name in health, where it could be the same as a service's


def _aborting(call: Callable[..., Awaitable[Message]]) -> Callable[..., Awaitable[Message]]:
    """Make a call end with the status of a `SidelightError`."""

    @functools.wraps(call)
    async def answer(self: "InferenceService", request: Message, context: Context) -> Message:
        try:
            return await call(self, request, context)
        except SidelightError as error:
            await abort(context, error)

    return answer


class InferenceService:
    """`inference.GRPCInferenceService` on an engine. Unary calls and streams that explain are run by `OpenCalls`."""

    def __init__(
        self,
        engine: Engine,
        handler: RequestHandler,
        calls: OpenCalls,
        shared: SystemSharedMemory,
        *,
        callers: Callers,
        serves: Callable[[str], bool],
    ) -> None:
        """`serves` returns whether a name of the health service serves."""
        self._registry = engine.registry
        self._callers = callers
        self._counters = handler.telemetry.counters
        self._calls = calls
        self._shared = shared
        self._serves = serves
        self._infer = InferHandler(engine, handler, shared)

    def handlers(self) -> grpc.GenericRpcHandler:
        methods: dict[str, Any] = {}
        for method in DESCRIPTOR.methods:
            call = getattr(self, method.name)
            request = getattr(oip, method.input_type.name)
            response = getattr(oip, method.output_type.name)
            if method.client_streaming:
                make: Any = grpc.stream_stream_rpc_method_handler
            else:
                make = grpc.unary_unary_rpc_method_handler
            methods[method.name] = make(
                call, request_deserializer=request.FromString, response_serializer=response.SerializeToString
            )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def ModelInfer(self, received: Decoded[oip.ModelInferRequest], context: Context) -> bytes:  # noqa: N802
        return await self._calls.run_unary("ModelInfer", received, context, self._infer.validate)

    async def ModelStreamInfer(self, request_iterator: object, context: Context) -> None:  # noqa: N802
        await self._calls.run_stream(context, functools.partial(InferStream, infer_handler=self._infer))

    async def ServerLive(self, request: oip.ServerLiveRequest, context: Context) -> oip.ServerLiveResponse:  # noqa: N802
        """Return true: a server that answers is live."""
        return oip.ServerLiveResponse(live=True)

    async def ServerReady(self, request: oip.ServerReadyRequest, context: Context) -> oip.ServerReadyResponse:  # noqa: N802
        """Return whether the health service reports the server as SERVING."""
        return oip.ServerReadyResponse(ready=self._serves(""))

    async def ModelReady(self, request: oip.ModelReadyRequest, context: Context) -> oip.ModelReadyResponse:  # noqa: N802
        """Return whether the health service reports a model as SERVING; false for an unknown one."""
        try:
            self._infer.check_version(request.name, request.version)
            is_ready = self._serves(MODEL + self._registry.find(request.name).name)
        except NotFound:
            is_ready = False
        return oip.ModelReadyResponse(ready=is_ready)

    async def ServerMetadata(  # noqa: N802
        self, request: oip.ServerMetadataRequest, context: Context
    ) -> oip.ServerMetadataResponse:
        return metadata.of_server(shared_memory=self._shared.is_allowed)

    @_aborting
    async def ModelMetadata(self, request: oip.ModelMetadataRequest, context: Context) -> oip.ModelMetadataResponse:  # noqa: N802
        return metadata.of_model(self._entry(request.name, request.version))

    @_aborting
    async def ModelConfig(self, request: oip.ModelConfigRequest, context: Context) -> oip.ModelConfigResponse:  # noqa: N802
        return oip.ModelConfigResponse(config=metadata.config_of(self._entry(request.name, request.version)))

    @_aborting
    async def ModelStatistics(  # noqa: N802
        self, request: oip.ModelStatisticsRequest, context: Context
    ) -> oip.ModelStatisticsResponse:
        """Return the statistics of one model, or of all."""
        entries = [self._entry(request.name, request.version)] if request.name else self._registry.entries.values()
        return oip.ModelStatisticsResponse(
            model_stats=[metadata.statistics_of(each, self._counters.statistics(each.name)) for each in entries]
        )

    async def RepositoryIndex(  # noqa: N802
        self, request: oip.RepositoryIndexRequest, context: Context
    ) -> oip.RepositoryIndexResponse:
        entries = [each for each in self._registry.entries.values() if each.models or not request.ready]
        return oip.RepositoryIndexResponse(models=map(metadata.index_of, entries))

    @_aborting
    async def SystemSharedMemoryStatus(  # noqa: N802
        self, request: oip.SystemSharedMemoryStatusRequest, context: Context
    ) -> oip.SystemSharedMemoryStatusResponse:
        """List the caller's regions, or return one of them."""
        regions = self._shared.of(self._callers.of(context))
        names = [request.name] if request.name else list(regions.by_name)
        for name in names:
            regions.find(name, field="name")
        return oip.SystemSharedMemoryStatusResponse(regions={name: regions.by_name[name].status() for name in names})

    @_aborting
    async def SystemSharedMemoryRegister(  # noqa: N802
        self, request: oip.SystemSharedMemoryRegisterRequest, context: Context
    ) -> oip.SystemSharedMemoryRegisterResponse:
        await self._shared.register(
            self._callers.of(context),
            context.peer(),
            name=request.name,
            key=request.key,
            offset=request.offset,
            n_bytes=request.byte_size,
        )
        return oip.SystemSharedMemoryRegisterResponse()

    @_aborting
    async def SystemSharedMemoryUnregister(  # noqa: N802
        self, request: oip.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> oip.SystemSharedMemoryUnregisterResponse:
        """Unregister one of the caller's regions, or all of them."""
        self._shared.unregister(self._callers.of(context), request.name)
        return oip.SystemSharedMemoryUnregisterResponse()

    def _entry(self, name: str, version: str) -> Entry:
        self._infer.check_version(name, version)
        return self._registry.find(name)
