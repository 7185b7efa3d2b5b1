"""Statuses: how a call ends whose answer is an error."""

import asyncio
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from ..errors import SidelightError
from ..telemetry.counters import Counters

RETRY_TRAILER = "retry-after-ms"

STATUSES: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


async def abort(context: Context, error: SidelightError) -> NoReturn:
    """End a call with an error's status, and in the trailers how long to wait before asking again."""
    trailers = () if error.retry_delay_s is None else ((RETRY_TRAILER, str(round(error.retry_delay_s * 1000))),)
    try:
        await context.abort(STATUSES[error.code], error.message, trailers)
    except grpc.aio.AbortError as aborted:
        # gRPC keeps it with the call, and its traceback keeps the message: a circle, which memory would fill up with
        # long before the garbage collector comes.
        if call := asyncio.current_task():
            call.add_done_callback(functools.partial(_forget_where, (aborted, error)))
        raise
    raise AssertionError("abort always raises")


def _forget_where(errors: Iterable[BaseException], _call: object) -> None:
    for error in errors:
        error.__traceback__ = error.__context__ = None


def forget_frames(task: "asyncio.Task[Any]") -> None:
    """Let a task that was cancelled go. To be called when it is done.

    It keeps its `CancelledError`, whose traceback keeps the frames, of which some keep the task: a circle, as above.
    """
    if task.cancelled():
        try:
            task.result()
        except asyncio.CancelledError as cancelled:
            cancelled.__traceback__ = cancelled.__context__ = None


def refusing(error: SidelightError, counts: Counters) -> "Handler":
    """Return the handler of a call that ends with an error before anything of it is read, and count it."""
    counts.unread[error.code] += 1

    async def refuse(_: object, context: Context) -> None:
        await abort(context, error)

    # Whatever the call is: gRPC reads the message of any other kind before it asks the handler.
    return grpc.stream_stream_rpc_method_handler(refuse)
