"""Statuses: an unexpected exception becomes a `SidelightError`, and a `SidelightError` the status of a call."""

import asyncio
import functools
import logging
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from ..compute.torch_device import is_out_of_memory
from ..engine.completion import forget_frames
from ..errors import Internal, ResourceExhausted, SidelightError
from ..telemetry.counters import Counters
from ..telemetry.logs import Event, Throttle

RETRY_TRAILER = "retry-after-ms"

STATUSES: dict[int, grpc.StatusCode] = {status.value[0]: status for status in grpc.StatusCode}

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


async def abort(context: Context, error: SidelightError) -> NoReturn:
    """End a call with an error's status; a retry delay goes into the trailing metadata."""
    try:
        await context.abort(STATUSES[error.code], error.message, retry_trailers(error))
    except grpc.aio.AbortError as aborted:
        # gRPC keeps this exception with the call, and its traceback keeps the message: a reference cycle. Without this
        # callback, such messages would fill the memory long before the garbage collector runs.
        if call := asyncio.current_task():
            call.add_done_callback(functools.partial(_forget_frames, (aborted, error)))
        raise
    raise AssertionError("abort always raises")


def retry_trailers(error: SidelightError) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata of an error: its retry delay, if it has one."""
    return () if error.retry_delay_s is None else ((RETRY_TRAILER, str(round(error.retry_delay_s * 1000))),)


def _forget_frames(errors: Iterable[BaseException], _call: object) -> None:
    for error in errors:
        forget_frames(error)


def rejecting_handler(error: SidelightError, counters: Counters) -> "Handler":
    """Return a handler that ends a call with an error before any of its message is read, and count the call."""
    counters.refused(error.code)

    async def refuse(_: object, context: Context) -> None:
        await abort(context, error)

    # Always a streaming handler: for other kinds gRPC reads the message before it calls the handler.
    return grpc.stream_stream_rpc_method_handler(refuse)


class HideInternalErrors:
    """Context manager that logs an unexpected exception and raises `Internal` without its details instead.

    A class, because `contextlib.contextmanager` costs more than what runs in it.
    """

    def __init__(self, id_: str, faults: Throttle) -> None:
        self._id = id_
        self._faults = faults

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, SidelightError):
            return
        if is_out_of_memory(error):
            self._faults.log(logging.WARNING, Event("out_of_host_memory", id=self._id))
            raise ResourceExhausted(
                "the server has no memory for the batch now; send it later, or fewer examples"
            ) from error
        self._faults.log(logging.ERROR, Event("unexpected", id=self._id), error)
        raise Internal("the server failed; its log has the cause") from error
