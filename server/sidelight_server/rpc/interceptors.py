"""The interceptor that reads and writes the messages of calls.

Each is read in a place of `ReceiveLimit`, once its call is known to be allowed, and decoded and encoded by `wire.codec`
where it holds tensors. An answer that its caller does not accept ends its call.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError
from sidelight.v1 import attribution_pb2 as pb

from ..errors import ResourceExhausted, SidelightError
from ..security.authorization import Callers
from ..security.stream_limit import Peers, host_of
from ..wire.codec import Unreadable, decode_request, decode_stream_request, encode, unreadable
from .receive_limit import PLACES, SLOW_PLACES, SMALL_PLACES, SMALL_S, Pace, ReceiveLimit
from .status import Context, abort
from .write_timeout import WriteTimeout

SMALL_BYTES = 64 * 1024  # of a message of any call but those that explain
MAX_PEER_REFLECTIONS = 8  # open at once, of one host
MAX_REFLECTIONS = 64
REFLECTION_S = 10.0  # that one may last

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


class MessageInterceptor(grpc.aio.ServerInterceptor):
    """Reads the messages of unary calls, within bounds, and has the answers of all calls accepted.

    What of a message is read by gRPC before a handler is asked for is nothing in calls that stream. So all do.
    """

    def __init__(self, callers: Callers, write_timeout: WriteTimeout, pace: Pace, *, max_arrival_s: float) -> None:
        self._callers = callers
        self._write_timeout = write_timeout
        self._pace = pace
        self._large = ReceiveLimit(places=PLACES, slow_places=SLOW_PLACES, within_s=max_arrival_s)
        self._small = ReceiveLimit(places=SMALL_PLACES, within_s=SMALL_S)
        self._reflections = Peers("streams of reflection", each=MAX_PEER_REFLECTIONS, all_=MAX_REFLECTIONS)

    @property
    def n_arriving(self) -> int:
        """How many messages are on their way in, but for those of streams."""
        return self._large.n_places + self._small.n_places

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the call's handler, its messages framed."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        if handler.request_deserializer == pb.AttributeRequest.FromString:
            return self._explaining(handler)
        if handler.request_deserializer == pb.AttributeStreamRequest.FromString:
            return self._streaming(handler)
        return self._reflecting(handler) if handler.stream_stream else self._small_call(handler)

    def _explaining(self, handler: "Handler") -> "Handler":
        explain: Any = handler.unary_unary

        async def answer(_: object, context: Context) -> Any:
            # The call has been authorized, so its caller is known.
            caller = self._callers.of(context)
            async with self._pace.turn(caller):
                received = await self._large.read(context, caller)
            if isinstance(received, SidelightError):
                received = Unreadable(received)
            try:
                return await explain(received, context)
            except grpc.aio.AbortError:
                self._pace.refuse(caller, received.n_bytes)
                raise
            except asyncio.CancelledError as cancelled:
                # Before Python 3.13 a frame of `TaskGroup` in the traceback refers to the error: a circle of
                # references, which would keep the message in memory until the garbage collector runs.
                raise cancelled.with_traceback(None) from None

        return grpc.stream_unary_rpc_method_handler(
            answer, request_deserializer=decode_request, response_serializer=encode
        )

    def _streaming(self, handler: "Handler") -> "Handler":
        talk: Any = handler.stream_stream

        async def converse(requests: object, context: Context) -> None:
            try:
                await talk(requests, context)
            except asyncio.CancelledError as cancelled:  # as above
                raise cancelled.with_traceback(None) from None
            self._write_timeout.expect()

        return grpc.stream_stream_rpc_method_handler(
            converse, request_deserializer=decode_stream_request, response_serializer=encode
        )

    def _small_call(self, handler: "Handler") -> "Handler":
        """Return the handler of a call whose messages are small. It may need no token, and refuses large ones."""
        behaviour: Any = handler.unary_unary or handler.unary_stream

        async def answer(_: object, context: Context) -> Any:
            request = await self._small.read(context, host_of(context.peer()))
            if isinstance(request, SidelightError):
                await abort(context, request)
            response = await behaviour(request, context)
            self._write_timeout.expect()
            return response

        made = grpc.stream_unary_rpc_method_handler if handler.unary_unary else grpc.stream_stream_rpc_method_handler
        return made(
            answer,
            request_deserializer=_small(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _reflecting(self, handler: "Handler") -> "Handler":
        """Return the handler of reflection, the one other stream: it has so many messages, and ends after a while."""
        talk: Any = handler.stream_stream
        read: Any = handler.request_deserializer

        async def converse(requests: object, context: Context) -> None:
            try:
                with self._reflections.opens(context.peer()):
                    async with asyncio.timeout(REFLECTION_S):
                        async for response in talk(requests, context):
                            await context.write(response)
            except TimeoutError:
                pass  # it ends with OK, and the caller begins another
            except ResourceExhausted as error:
                await abort(context, error)
            self._write_timeout.expect()

        def decode(content: bytes) -> Any:
            request = _small(read)(content)
            # Reflection itself refuses a question that asks for nothing.
            return read(b"") if isinstance(request, SidelightError) else request

        return grpc.stream_stream_rpc_method_handler(
            converse, request_deserializer=decode, response_serializer=handler.response_serializer
        )


def _small(read: Any) -> Callable[[bytes], Any]:
    """Return a decoder that refuses what cannot be read. gRPC would answer UNKNOWN, and log a traceback each time."""

    def decode(content: bytes) -> Any:
        if len(content) > SMALL_BYTES:
            return ResourceExhausted(f"message: {len(content)} bytes, this call takes {SMALL_BYTES} at most")
        try:
            return read(content)
        except (DecodeError, MemoryError) as error:
            return unreadable(content, error)

    return decode
