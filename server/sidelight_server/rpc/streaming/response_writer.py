"""The response writer of a stream: one task that writes one message at a time, with a time limit on each.

The limit counts from when a message is ready, not from when it reaches the front of the queue. Otherwise a client that
accepts every message slowly could hold the permit of the last one for n times the limit.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

Later = Callable[[], Awaitable[bytes | None]]  # makes a message once it can be written; None: nothing to write


class StalledError(Exception):
    """The client does not accept a response in time. The stream must end, or it would hold its permits forever."""


class _Entry:
    """A message to write. `ready_s` is the time that its limit counts from."""

    __slots__ = ("on_written", "ready_s", "response")

    def __init__(self, response: bytes | Later, ready_s: float, on_written: Callable[[], None] | None) -> None:
        self.response = response
        self.ready_s = ready_s
        self.on_written = on_written


class ResponseWriter:
    """Writes the responses of one stream in the order of `put`. `run` is the task; it ends after `close`.

    A write waits while gRPC's flow control has no room. Cancel the task only together with the whole stream: gRPC
    accepts no other write until one has ended.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], *, stalled_write_s: float) -> None:
        self._context = context
        self._stalled_write_s = stalled_write_s  # 0: no limit
        self._loop = asyncio.get_running_loop()
        self._entries: deque[_Entry] = deque()  # the first is being written
        self._task: asyncio.Task[Any] | None = None
        self._wake: asyncio.Future[None] | None = None  # what the task waits for while there is nothing to write
        self._timer: asyncio.TimerHandle | None = None  # one for all messages: see `_look`
        self._is_closed = self._is_stalled = False

    def drop_call(self) -> None:
        """Drop the reference to the call; nothing can be written afterwards."""
        del self._context

    def put(self, response: bytes | Later, on_written: Callable[[], None] | None = None) -> None:
        """Write a message after those before it, then call `on_written`."""
        self._entries.append(_Entry(response, self._loop.time(), on_written))
        if self._timer is None and self._stalled_write_s:
            self._timer = self._loop.call_later(self._stalled_write_s, self._look)
        self._wake_up()

    async def write(self, response: bytes) -> None:
        """Write a message, and wait until it is written."""
        written = self._loop.create_future()
        self.put(response, lambda: None if written.done() else written.set_result(None))
        await written

    def close(self) -> None:
        """Let the task end once everything is written."""
        self._is_closed = True
        self._wake_up()

    async def run(self) -> None:
        """Write until closed. Raises `StalledError` if the client does not accept a message in time."""
        self._task = asyncio.current_task()
        try:
            while await self._has_entry():
                entry = self._entries[0]
                await self._write(entry)
                self._entries.popleft()
                if entry.on_written:
                    entry.on_written()
        except asyncio.CancelledError:
            if self._is_stalled:
                raise StalledError from None
            raise
        finally:
            self._task = None
            if self._timer:
                self._timer.cancel()

    async def _has_entry(self) -> bool:
        """Wait for a message; return False if there will be none."""
        while not (self._entries or self._is_closed):
            self._wake = self._loop.create_future()
            await self._wake
        return bool(self._entries)

    async def _write(self, entry: _Entry) -> None:
        response = entry.response
        if not isinstance(response, bytes):
            made = await response()
            if made is None:
                return
            response, entry.ready_s = made, self._loop.time()
        # The client disconnected: not an error, and gRPC is about to cancel this call.
        with contextlib.suppress(grpc.aio.InternalError):
            await self._context.write(response)

    def _wake_up(self) -> None:
        if self._wake and not self._wake.done():
            self._wake.set_result(None)

    def _look(self) -> None:
        """End the task if the first message has waited too long; else check again when it would have."""
        self._timer = None
        if not (self._entries and self._task):
            return
        left_s = self._entries[0].ready_s + self._stalled_write_s - self._loop.time()
        if left_s > 0:
            self._timer = self._loop.call_later(left_s, self._look)
        else:
            self._is_stalled = True
            self._task.cancel()
