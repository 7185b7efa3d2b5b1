"""The interceptor that reads and writes the messages of all calls.

It reads a message only after its call was authorized and while holding a slot of `ReceiveLimit`. `wire.codec` decodes
and encodes messages with tensors. A call whose client does not accept the answer in time is cut off.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from sidelight.v1 import attribution_pb2 as pb

from ..errors import ResourceExhausted, SidelightError
from ..security.authorization import Callers
from ..security.stream_limit import Peers, host_of
from ..wire.codec import Decode, Unreadable, decode_request, decode_stream_request, encode, unreadable
from .limits.reading import messages
from .limits.receive_limit import SLOTS, SLOW_SLOTS, SMALL_S, SMALL_SLOTS, Pace, ReceiveLimit
from .limits.write_timeout import WriteTimeout
from .status import Context, abort

SMALL_BYTES = 64 * 1024  # limit of a message of any call that explains no batch
MAX_PEER_REFLECTIONS = 8  # open reflection streams from one host
MAX_REFLECTIONS = 64
REFLECTION_S = 10.0  # the longest that a reflection stream may last

# By the deserializer that a service was registered with, the one that reads its messages with tensors.
DECODERS: dict[Any, Decode[Any]] = {
    pb.AttributeRequest.FromString: decode_request,
    pb.AttributeStreamRequest.FromString: decode_stream_request,
}

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


class MessageInterceptor(grpc.aio.ServerInterceptor):
    """Reads the messages of unary calls within limits, and applies the write timeout to all calls.

    gRPC reads the message of a unary-request call before it looks up the handler, but nothing of a streaming request.
    So every call is registered as a streaming one; both are the same on the wire.
    """

    def __init__(
        self,
        callers: Callers,
        write_timeout: WriteTimeout,
        pace: Pace,
        *,
        max_arrival_s: float,
        decoders: Mapping[Any, Decode[Any]] = DECODERS,
    ) -> None:
        self._decoders = decoders
        self._callers = callers
        self._write_timeout = write_timeout
        self._large = ReceiveLimit(pace, slots=SLOTS, slow_slots=SLOW_SLOTS, within_s=max_arrival_s)
        self._small = ReceiveLimit(Pace(), slots=SMALL_SLOTS, within_s=SMALL_S)
        self._reflections = Peers("streams of reflection", each=MAX_PEER_REFLECTIONS, all_=MAX_REFLECTIONS)

    @property
    def n_arriving(self) -> int:
        """Number of messages that are being received, without those of streams."""
        return self._large.n_slots + self._small.n_slots

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the call's handler, wrapped by the kind of its messages."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        if decode := self._decoders.get(handler.request_deserializer):
            return self._streaming(handler, decode) if handler.stream_stream else self._explaining(handler, decode)
        return self._reflecting(handler) if handler.stream_stream else self._small_call(handler)

    def _explaining(self, handler: "Handler", decode: Decode[Any]) -> "Handler":
        explain: Any = handler.unary_unary

        async def answer(_: object, context: Context) -> Any:
            # The call has been authorized, so its caller is known.
            caller = self._callers.of(context)
            received = await self._large.read(context, caller)
            if isinstance(received, SidelightError):
                received = Unreadable(received)
            try:
                return await explain(received, context)
            except asyncio.CancelledError as cancelled:
                # Before Python 3.13 a frame of `TaskGroup` in the traceback refers to the error: a circle of
                # references, which would keep the message in memory until the garbage collector runs.
                raise cancelled.with_traceback(None) from None

        return grpc.stream_unary_rpc_method_handler(answer, request_deserializer=decode, response_serializer=encode)

    def _streaming(self, handler: "Handler", decode: Decode[Any]) -> "Handler":
        talk: Any = handler.stream_stream

        async def converse(requests: object, context: Context) -> None:
            try:
                await talk(requests, context)
            except asyncio.CancelledError as cancelled:  # as above
                raise cancelled.with_traceback(None) from None
            self._write_timeout.expect()

        return grpc.stream_stream_rpc_method_handler(converse, request_deserializer=decode, response_serializer=encode)

    def _small_call(self, handler: "Handler") -> "Handler":
        """Return the handler of a call with small messages. It may need no token, and rejects large messages."""
        behavior: Any = handler.unary_unary or handler.unary_stream

        async def answer(_: object, context: Context) -> Any:
            request = await self._small.read(context, host_of(context.peer()))
            if isinstance(request, SidelightError):
                self._write_timeout.expect()
                await abort(context, request)
            response = await behavior(request, context)
            self._write_timeout.expect()
            return response

        made = grpc.stream_unary_rpc_method_handler if handler.unary_unary else grpc.stream_stream_rpc_method_handler
        return made(
            answer,
            request_deserializer=_small(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _reflecting(self, handler: "Handler") -> "Handler":
        """Return the handler of reflection, the only other streaming call: limited in number and in time."""
        talk: Any = handler.stream_stream
        read: Any = handler.request_deserializer

        async def converse(_: object, context: Context) -> None:
            try:
                with self._reflections.opens(context.peer()):
                    async with asyncio.timeout(REFLECTION_S):
                        async for response in talk(messages(context), context):
                            await context.write(response)
            except TimeoutError:
                pass  # the stream ends with OK; the client can open another
            except ResourceExhausted as error:
                await abort(context, error)
            self._write_timeout.expect()

        def decode(content: bytes) -> Any:
            request = _small(read)(content)
            # Reflection answers an empty request with an error.
            return read(b"") if isinstance(request, SidelightError) else request

        return grpc.stream_stream_rpc_method_handler(
            converse, request_deserializer=decode, response_serializer=handler.response_serializer
        )


def _small(read: Any) -> Callable[[bytes], Any]:
    """Return a decoder that returns an error instead of raising: gRPC would answer UNKNOWN and log a traceback."""

    def decode(content: bytes) -> Any:
        if len(content) > SMALL_BYTES:
            return ResourceExhausted(f"message: {len(content)} bytes, this call takes {SMALL_BYTES} at most")
        try:
            return read(content)
        except (DecodeError, MemoryError) as error:
            return unreadable(content, error)

    return decode
