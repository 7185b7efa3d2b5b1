"""The framing: calls whose messages are read and written as `frames` does, and a word for those that cannot be read."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from sidelight.v1 import attribution_pb2 as pb

from .errors import SidelightError
from .frames import decode_request, decode_stream_request, encode, unreadable
from .status import Context, abort

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


class Framing(grpc.aio.ServerInterceptor):
    """Decodes and encodes the messages that hold tensors as `frames` does, instead of the generated code."""

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the call's handler, its messages framed."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        if handler.request_deserializer not in _DECODERS:
            return _guarded(handler)
        made = grpc.stream_stream_rpc_method_handler if handler.stream_stream else grpc.unary_unary_rpc_method_handler
        behaviour: Any = handler.stream_stream or handler.unary_unary
        return made(
            behaviour,
            request_deserializer=_DECODERS[handler.request_deserializer],
            response_serializer=encode,
        )


_DECODERS: dict[Any, Callable[[bytes], Any]] = {
    pb.AttributeRequest.FromString: decode_request,
    pb.AttributeStreamRequest.FromString: decode_stream_request,
}


def _guarded(handler: "Handler") -> "Handler":
    """Return a handler that refuses what cannot be read. gRPC would answer UNKNOWN, and log a traceback each time."""
    read: Any = handler.request_deserializer
    behaviour: Any = handler.unary_unary or handler.unary_stream
    talk: Any = handler.stream_stream

    def decode(content: bytes) -> Any:
        try:
            return read(content)
        except (DecodeError, MemoryError) as error:
            # Reflection, the one stream here, itself refuses a question that asks for nothing.
            return unreadable(content, error) if behaviour else read(b"")

    async def answer(request: Any, context: Context) -> Any:
        if isinstance(request, SidelightError):
            await abort(context, request)
        return await behaviour(request, context)

    coders = {"request_deserializer": decode, "response_serializer": handler.response_serializer}
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler(answer, **coders)
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler(answer, **coders)
    return grpc.stream_stream_rpc_method_handler(talk, **coders)
