"""Reading: how the messages of calls are taken from gRPC, so that each one is freed.

If the task that waits for a message is cancelled, gRPC's asyncio server still receives the message, and never frees its
buffer (grpc/grpc#43360): up to `max_message_bytes` each time. So a task of its own waits, which is not cancelled with
the call: gRPC ends it, at the latest when the call has ended.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from ..status import Context

READING = "sidelight-read"  # the name of such a task


async def read(context: Context) -> Any:
    """Return a call's next message, or `grpc.aio.EOF`. If this is cancelled, the message is dropped when it arrives."""
    reading = asyncio.create_task(context.read(), name=READING)
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        reading.add_done_callback(_drop)
        raise
    finally:
        del context, reading  # gRPC ends a call that nothing refers to, and a traceback keeps this frame's variables


async def messages(context: Context) -> AsyncIterator[Any]:
    """Yield the messages of a call."""
    while (message := await read(context)) is not grpc.aio.EOF:
        yield message


def _drop(reading: "asyncio.Task[Any]") -> None:
    if not reading.cancelled():
        reading.exception()  # the call has ended; unless an exception is looked at, asyncio logs it
