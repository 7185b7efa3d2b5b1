"""The status: how a call ends whose answer is an error."""

from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from .counts import Counts
from .errors import SidelightError

RETRY_TRAILER = "retry-after-ms"

STATUSES: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


async def abort(context: Context, error: SidelightError) -> NoReturn:
    """End a call with an error's status, and in the trailers how long to wait before asking again."""
    trailers = () if error.retry_delay_s is None else ((RETRY_TRAILER, str(round(error.retry_delay_s * 1000))),)
    await context.abort(STATUSES[error.code], error.message, trailers)
    raise AssertionError("abort always raises")


def refusing(error: SidelightError, counts: Counts) -> "Handler":
    """Return the handler of a call that ends with an error before anything of it is read, and count it."""
    counts.unread[error.code] += 1

    async def refuse(_: object, context: Context) -> None:
        await abort(context, error)

    # Whatever the call is: gRPC reads the message of any other kind before it asks the handler.
    return grpc.stream_stream_rpc_method_handler(refuse)
