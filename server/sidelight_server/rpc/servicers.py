"""The gRPC servicers of `sidelight.v1`, AttributionService and ModelService: one function for each method."""

import functools
from importlib import metadata

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc

from ..engine.engine import Engine
from ..errors import PermissionDenied, SidelightError
from ..telemetry.call_record import CallRecord
from ..wire import responses
from ..wire.codec import Decoded, Received
from ..wire.methods import SERVED_METHODS
from ..wire.requests import MAX_EXAMPLES
from .open_calls import OpenCalls
from .request_handler import RequestHandler
from .shared_memory import Regions, SharedMemory
from .status import Context, abort
from .streaming.attribution_stream import AttributionStream
from .validated_request import ValidatedRequest


class AttributionService(attribution_pb2_grpc.AttributionServiceServicer):
    """`sidelight.v1.AttributionService` on an engine. `MessageInterceptor` decodes and encodes its messages."""

    def __init__(self, engine: Engine, handler: RequestHandler, calls: OpenCalls, shared: SharedMemory | None) -> None:
        self._engine = engine
        self._handler = handler
        self._calls = calls
        self._shared = shared

    # The generated base class is typed for plain messages; this handler takes a `Decoded` and returns encoded bytes.
    async def Attribute(  # type: ignore[override]  # noqa: N802
        self, received: Decoded[pb.AttributeRequest], context: Context
    ) -> bytes:
        return await self._calls.run_unary("Attribute", received, context, self._validate)

    # As above; also, it is typed for a handler that yields. Writing to the context allows answers out of order.
    async def AttributeStream(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: Context
    ) -> None:
        await self._calls.run_stream(context, functools.partial(AttributionStream, regions=Regions(self._shared)))

    async def _validate(self, received: Received[pb.AttributeRequest], call_record: CallRecord) -> ValidatedRequest:
        return await self._handler.validate(
            received.message, n_bytes=received.n_bytes, data=received.data, call_record=call_record
        )

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        return server_info(self._engine, self._shared)


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """`sidelight.v1.ModelService` on an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ListModels(  # noqa: N802
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        return model_pb2.ListModelsResponse(models=models(self._engine))

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        try:
            entry = self._engine.registry.find(request.name)
        except SidelightError as error:
            await abort(context, error)
        return model_pb2.GetModelResponse(model=responses.model_info(self._engine, entry, whole=True))

    async def ReloadModel(  # noqa: N802
        self, request: model_pb2.ReloadModelRequest, context: Context
    ) -> model_pb2.ReloadModelResponse:
        """Load a model again; answer once the new version serves."""
        try:
            if not self._engine.settings.allow_reload:
                raise PermissionDenied("ReloadModel: the operator of this server does not allow it (allow_reload)")
            entry = await self._engine.registry.reload(request.name)
        except SidelightError as error:
            await abort(context, error)
        return model_pb2.ReloadModelResponse(model=responses.model_info(self._engine, entry, whole=True))


def server_info(engine: Engine, shared: SharedMemory | None = None) -> pb.GetServerInfoResponse:
    """Return version, limits, methods and models."""
    settings, cancelled = engine.settings, engine.cancellations
    return pb.GetServerInfoResponse(
        version=metadata.version("sidelight"),
        limits=pb.Limits(
            max_message_bytes=settings.max_message_bytes,
            max_image_pixels=settings.max_image_pixels,
            max_in_flight=settings.max_in_flight,
            max_in_flight_bytes=settings.max_in_flight_bytes,
            max_stream_in_flight=settings.max_stream_in_flight,
            max_example_rows=settings.max_example_rows,
            max_batch_examples=MAX_EXAMPLES,
            max_rendered_pixels=settings.max_rendered_pixels,
            max_stream_age=responses.duration(settings.max_stream_age_s) if settings.max_stream_age_s else None,
        ),
        methods=SERVED_METHODS,
        models=models(engine),
        cancellations=pb.CancellationStats(
            count=cancelled.count,
            mean=responses.duration(cancelled.mean_s),
            longest=responses.duration(cancelled.longest_s),
        ),
        shared_memory=_shared_memory(shared) if shared else None,
    )


def models(engine: Engine) -> list[model_pb2.ModelInfo]:
    """Return every model, without labels and layers."""
    return [responses.model_info(engine, entry, whole=False) for entry in engine.registry.entries.values()]


def _shared_memory(shared: SharedMemory) -> pb.SharedMemory:
    return pb.SharedMemory(
        directory=str(shared.path),
        max_region_bytes=shared.max_region_bytes,
        max_stream_regions=shared.max_stream_regions,
    )
