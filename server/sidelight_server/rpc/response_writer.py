"""The response writer of a stream: one message at a time, each with a time limit for the client to accept it.

The limit counts from when a message is ready, not from when it reaches the front of the queue. Otherwise a client that
accepts every message slowly could hold the permit of the last one for n times the limit.
"""

import asyncio
import contextlib
from typing import Any

import grpc


class StalledError(Exception):
    """The client does not accept a response in time. The stream must end, or it would hold its permits forever."""


class ResponseWriter:
    """Writes the responses of one stream, one after the other.

    A write waits while gRPC's flow control has no room. Cancel a write only together with the whole stream: gRPC
    accepts no other write until it has ended.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], *, stalled_write_s: float) -> None:
        self._context = context
        self._stalled_write_s = stalled_write_s or None
        self.lock = asyncio.Lock()

    def release(self) -> None:
        """Drop the reference to the call; nothing can be written afterwards."""
        del self._context

    async def write(self, response: bytes) -> None:
        """Wait for the lock and write a message. Raises `StalledError` if the client does not accept it in time."""
        try:
            async with asyncio.timeout(self._stalled_write_s), self.lock:
                await self._write(response)
        except TimeoutError:
            raise StalledError from None

    async def write_now(self, response: bytes) -> None:
        """Write a message while already holding `lock`. Raises `StalledError` as `write` does."""
        try:
            async with asyncio.timeout(self._stalled_write_s):
                await self._write(response)
        except TimeoutError:
            raise StalledError from None

    async def _write(self, response: bytes) -> None:
        # The client disconnected: not an error, and gRPC is about to cancel this call.
        with contextlib.suppress(grpc.aio.InternalError):
            await self._context.write(response)
