"""The response writer of a stream: one message at a time, each with a time limit for the caller to accept it.

That time begins when the message is there to be written, not when its turn comes: a caller who takes all of them, but
slowly, would otherwise hold the last one's permit for as many times as long.
"""

import asyncio
import contextlib
from typing import Any

import grpc


class StalledError(Exception):
    """The caller does not accept what is written: the stream must end, or it would hold its permits for ever."""


class ResponseWriter:
    """Writes the responses of one stream, in turn.

    A write waits while gRPC's flow control has no room for it. It must not be cancelled unless the whole stream is:
    gRPC takes no other until it has ended.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], *, stalled_write_s: float) -> None:
        self._context = context
        self._stalled_write_s = stalled_write_s or None
        self.turn = asyncio.Lock()

    def let_go(self) -> None:
        """Keep the call no longer; nothing more can be written."""
        del self._context

    async def write(self, response: bytes) -> None:
        """Write a message when it is its turn. `StalledError` where the caller has not accepted it in time."""
        try:
            async with asyncio.timeout(self._stalled_write_s), self.turn:
                await self._write(response)
        except TimeoutError:
            raise StalledError from None

    async def write_now(self, response: bytes) -> None:
        """Write a message by one who has the turn."""
        try:
            async with asyncio.timeout(self._stalled_write_s):
                await self._write(response)
        except TimeoutError:
            raise StalledError from None

    async def _write(self, response: bytes) -> None:
        # A caller who has gone is no fault, and gRPC is about to cancel this call.
        with contextlib.suppress(grpc.aio.InternalError):
            await self._context.write(response)
