"""Load shedding: ends streams that wait for a message while memory is short.

gRPC buffers messages that are still arriving, does not report their size, and has no limit for their total. A stream
can be ended at any time without loss: batches that were read are answered, and the client opens a new stream. That
frees the buffered part of its next message.
"""

import asyncio
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable

from ..compute.host_memory import AvailableMemory, available_memory, trim
from ..engine.completion import call_soon
from ..telemetry.logs import Event

log = logging.getLogger("sidelight")

EVERY_S = 0.02  # between two checks, each of which takes 0.1 ms
FALL_CHECKS = 5  # the fall of the available memory is measured over this many checks
FALLS_AHEAD = 2  # and extrapolated over this many times as long: memory that will be short then is short now
BUSY_S = 0.1  # a stream is not ended if it has waited for a shorter time
FREEING_S = 0.1  # time for ended streams to free their memory
FAILED_PAUSE_S = 0.25  # pause if memory is still short and no stream can be ended: something else uses it
MESSAGES_LEFT = 6  # memory is short if less is available than this many of the largest messages need
SHARE_OF_LIMIT = 0.25  # but never while more than this share of the limit is: a small idle server is not short of it


class LoadShedding:
    """Checks the available memory, and ends waiting streams while it is short.

    A thread checks, because the event loop may be busy with messages for longer than the memory lasts. Streams are
    ended on the event loop. First the memory that the C library keeps after it was freed is returned to the system,
    which may be sufficient. If memory is very short, this would take too long, and streams are ended first.
    """

    def __init__(
        self,
        end_waiting: Callable[[float], int],
        *,
        max_message_bytes: int,
        available: Callable[[], AvailableMemory | None] = available_memory,
    ) -> None:
        """`end_waiting(seconds)` ends the streams that have waited for longer, and returns their number."""
        self._end_waiting = end_waiting
        self._max_message_bytes = max_message_bytes
        self._available = available
        self._fall_bytes = 0  # of the available memory, over the last checks
        self._is_closed = threading.Event()

    async def run(self) -> None:
        """Check periodically, until cancelled."""
        is_short = asyncio.Event()
        watch = functools.partial(self._watch, asyncio.get_running_loop(), is_short)
        # A daemon thread, and not the loop's executor: it must not keep a process from exiting.
        watching = threading.Thread(target=watch, name="sidelight-memory", daemon=True)
        watching.start()
        try:
            while True:
                await is_short.wait()
                is_short.clear()
                if not await self.check():
                    await asyncio.sleep(FAILED_PAUSE_S)
        finally:
            self._is_closed.set()
            watching.join()

    async def check(self) -> bool:
        """Check once, and end streams if memory is short. Return False if it stays short and no stream was ended."""
        if not (short := self._shortage()):
            return True
        if not self._is_short(short, share=0.5):
            await asyncio.to_thread(trim)
            if not (short := self._shortage()):
                return True
        n_ended = self._end_waiting(BUSY_S)
        if n_ended:
            log.warning(Event("streams_shed", streams=n_ended, left_bytes=short.left, limit_bytes=short.limit))
            await asyncio.sleep(FREEING_S)
        await asyncio.to_thread(trim)
        return n_ended > 0 or not self._shortage()

    def _watch(self, loop: asyncio.AbstractEventLoop, is_short: asyncio.Event) -> None:
        """Set the event whenever memory is short, until this is closed. Runs in the thread."""
        last: deque[int] = deque(maxlen=FALL_CHECKS)
        while not self._is_closed.wait(EVERY_S):
            if now := self._available():
                last.append(now.left)
                self._fall_bytes = max(0, last[0] - now.left)
                if self._is_short(now):
                    call_soon(loop, is_short.set)

    def _shortage(self) -> AvailableMemory | None:
        """Return the available memory if it is short; None if it is sufficient or unknown."""
        now = self._available()
        return now if now and self._is_short(now) else None

    def _is_short(self, now: AvailableMemory, *, share: float = 1.0) -> bool:
        """Whether less than `share` of the required memory is available, or will be soon."""
        least_bytes = min(MESSAGES_LEFT * self._max_message_bytes, SHARE_OF_LIMIT * now.limit)
        return now.left - FALLS_AHEAD * self._fall_bytes < share * least_bytes
