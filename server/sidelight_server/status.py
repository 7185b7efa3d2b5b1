"""The status: how a call ends whose answer is an error."""

from typing import Any, NoReturn

import grpc

from .errors import SidelightError

RETRY_TRAILER = "retry-after-ms"

STATUSES: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}

Context = grpc.aio.ServicerContext[Any, Any]


async def abort(context: Context, error: SidelightError) -> NoReturn:
    """End a call with an error's status, and in the trailers how long to wait before asking again."""
    trailers = () if error.retry_delay_s is None else ((RETRY_TRAILER, str(round(error.retry_delay_s * 1000))),)
    await context.abort(STATUSES[error.code], error.message, trailers)
    raise AssertionError("abort always raises")
