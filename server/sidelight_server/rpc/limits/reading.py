"""Reading: how the messages of calls are taken from gRPC, so that each one is freed.

If the task that waits for a message is cancelled, gRPC's asyncio server still receives the message, and never frees its
buffer (for the same reason as grpc/grpc#43360): up to `max_message_bytes` each time. So a task of its own waits, which
is not cancelled with the call: gRPC ends it, at the latest when the call has ended.
"""

import asyncio
import weakref
from collections.abc import AsyncIterator
from typing import Any

import grpc

from ..status import Context

Task = asyncio.Task[Any]

# Reads that were cancelled, by the task that was. Weak references, because a read refers to its call.
_abandoned: weakref.WeakKeyDictionary[Task, weakref.ref[Task]] = weakref.WeakKeyDictionary()


async def read(context: Context) -> Any:
    """Return a call's next message, or `grpc.aio.EOF`. If this is cancelled, the message is dropped when it arrives."""
    reading = asyncio.create_task(context.read())
    try:
        await asyncio.wait([reading])  # unlike `await reading`, it does not cancel the read with this task
        return reading.result()
    except asyncio.CancelledError:
        reading.add_done_callback(_drop)
        if call := asyncio.current_task():
            _abandoned[call] = weakref.ref(reading)
        raise
    finally:
        del context, reading  # gRPC ends a call that nothing refers to, and a traceback keeps this frame's variables


async def messages(context: Context) -> AsyncIterator[Any]:
    """Yield the messages of a call."""
    while (message := await read(context)) is not grpc.aio.EOF:
        yield message


def end_abandoned(call: Task) -> None:
    """End the read that was cancelled in this task, if any, because it refers to the call."""
    abandoned = _abandoned.pop(call, None)
    if abandoned and (reading := abandoned()):
        reading.cancel()


def _drop(reading: Task) -> None:
    if not reading.cancelled():
        reading.exception()  # the call has ended; unless an exception is looked at, asyncio logs it
