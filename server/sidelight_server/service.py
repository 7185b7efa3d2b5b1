"""The service: the calls of `sidelight.v1`. Here errors become statuses."""

import contextlib
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import DecodeError, Message
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc

from . import replies
from .engine import Engine
from .errors import InvalidArgument, SidelightError, Unimplemented
from .explainer import Explainer
from .method_messages import SERVED_METHODS
from .stream import Stream

RETRY_TRAILER = "retry-after-ms"

STATUSES: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


class AttributionService(attribution_pb2_grpc.AttributionServiceServicer):
    """`sidelight.v1.AttributionService` on an engine."""

    def __init__(self, engine: Engine, explainer: Explainer) -> None:
        self._engine = engine
        self._explainer = explainer

    async def Attribute(self, request: pb.AttributeRequest | SidelightError, context: Context) -> pb.AttributeResponse:  # noqa: N802
        """Explain one batch."""
        try:
            if isinstance(request, SidelightError):
                raise request
            inquiry = self._explainer.inquire(request)
            permit = contextlib.ExitStack()
            permit.enter_context(self._explainer.admission.enter(inquiry.n_bytes))
            # Once the answer is written, not when it is made. (The stubs know callbacks as a class, not as a protocol.)
            context.add_done_callback(lambda _: permit.close())  # type: ignore[arg-type]
            return pb.AttributeResponse(id=request.id, result=await self._explainer.explain(inquiry))
        except SidelightError as error:
            await abort(context, error)

    # The generated stub knows only handlers that yield; one that writes lets answers overtake each other.
    async def AttributeStream(  # type: ignore[override]  # noqa: N802
        self, request_iterator: object, context: Context
    ) -> None:
        """Explain many batches over one connection."""
        stream = Stream(context, self._explainer, max_in_flight=self._engine.settings.max_stream_in_flight)
        await stream.run()

    async def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        """Return version, limits, methods and models."""
        settings, stops = self._engine.settings, self._engine.stops
        return pb.GetServerInfoResponse(
            version=metadata.version("sidelight"),
            limits=pb.Limits(
                max_message_bytes=settings.max_message_bytes,
                max_image_pixels=settings.max_image_pixels,
                max_in_flight=settings.max_in_flight,
                max_in_flight_bytes=settings.max_in_flight_bytes,
                max_stream_in_flight=settings.max_stream_in_flight,
                max_example_rows=settings.max_example_rows,
            ),
            methods=SERVED_METHODS,
            models=[replies.model_info(self._engine, each, whole=False) for each in self._engine.models.values()],
            stops=pb.Stops(
                count=stops.count, mean=replies.duration(stops.mean_s), longest=replies.duration(stops.longest_s)
            ),
        )


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """`sidelight.v1.ModelService` on an engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ListModels(  # noqa: N802
        self, request: model_pb2.ListModelsRequest, context: Context
    ) -> model_pb2.ListModelsResponse:
        """Return every model without labels and layers."""
        models = self._engine.models.values()
        return model_pb2.ListModelsResponse(
            models=[replies.model_info(self._engine, each, whole=False) for each in models]
        )

    async def GetModel(  # noqa: N802
        self, request: model_pb2.GetModelRequest, context: Context
    ) -> model_pb2.GetModelResponse:
        """Return one model whole."""
        try:
            model = self._engine.model(request.name)
        except SidelightError as error:
            await abort(context, error)
        return model_pb2.GetModelResponse(model=replies.model_info(self._engine, model, whole=True))

    async def ReloadModel(  # noqa: N802
        self, request: model_pb2.ReloadModelRequest, context: Context
    ) -> model_pb2.ReloadModelResponse:
        """Say that reloading is not served."""
        await abort(context, Unimplemented("ReloadModel: reloading is not served by this version; restart the server"))


class Undecodable(grpc.aio.ServerInterceptor):
    """Lets bytes that are no message through as the error that says so: gRPC's own way would end a whole stream."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the call's handler, its decoding made tolerant."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer not in _DECODERS:
            return handler
        made = grpc.stream_stream_rpc_method_handler if handler.stream_stream else grpc.unary_unary_rpc_method_handler
        behaviour: Any = handler.stream_stream or handler.unary_unary
        return made(
            behaviour,
            request_deserializer=_DECODERS[handler.request_deserializer],
            response_serializer=handler.response_serializer,
        )


def _tolerant(decode: Callable[[bytes], Message]) -> Callable[[bytes], Message | SidelightError]:
    def decode_or_say(data: bytes) -> Message | SidelightError:
        try:
            return decode(data)
        except DecodeError:
            return InvalidArgument(f"message: {len(data)} bytes that cannot be decoded")

    return decode_or_say


_DECODERS = {
    decode: _tolerant(decode) for decode in (pb.AttributeRequest.FromString, pb.AttributeStreamRequest.FromString)
}


async def abort(context: Context, error: SidelightError) -> NoReturn:
    """End a call with an error's status, and in the trailers how long to wait before asking again."""
    trailers = () if error.retry_delay_s is None else ((RETRY_TRAILER, str(round(error.retry_delay_s * 1000))),)
    await context.abort(STATUSES[error.code], error.message, trailers)
    raise AssertionError("abort always raises")
