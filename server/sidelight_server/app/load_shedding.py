"""Load shedding: ends streams that wait for a message while memory is short.

gRPC buffers messages that are still arriving, does not report their size, and has no limit for their total. A stream
can be ended at any time without loss: batches that were read are answered, and the client opens a new stream. That
frees the buffered part of its next message.
"""

import asyncio
import logging
from collections.abc import Callable

from ..compute.host_memory import Room, give_back, room
from ..telemetry.logs import Event

log = logging.getLogger("sidelight")

EVERY_S = 0.25  # between two checks, and the least wait of a stream that is ended, so that busy ones are not
FREEING_S = 0.25  # time for ended streams to free their memory
VAIN_PAUSE_S = 1.0  # pause if memory is still short after ending streams: something else uses it
MESSAGES_LEFT = 4  # memory is short below this many of the largest messages, which 10 Gbit/s bring between checks
SHARE_OF_LIMIT = 0.25  # but not above this share of the limit: a small idle server is not short of memory


class LoadShedding:
    """Checks the available memory, and ends waiting streams while it is short. Used on the event loop only.

    Freed memory that the C library keeps is returned to the system first, which may be sufficient.
    """

    def __init__(
        self,
        end_waiting: Callable[[float], int],
        *,
        max_message_bytes: int,
        room: Callable[[], Room | None] = room,
    ) -> None:
        """`end_waiting` ends the streams that have waited longer than so many seconds; it returns their number."""
        self._end_waiting = end_waiting
        self._max_message_bytes = max_message_bytes
        self._room = room

    async def run(self) -> None:
        """Check periodically, until cancelled."""
        while True:
            pause_s = EVERY_S if await self.look() else VAIN_PAUSE_S
            await asyncio.sleep(pause_s)

    async def look(self) -> bool:
        """Check once, and end streams if memory is short. Return False if it still is."""
        if not self._shortage():
            return True
        await asyncio.to_thread(give_back)
        if not (short := self._shortage()):
            return True
        n_ended = self._end_waiting(EVERY_S)
        if n_ended:
            log.warning(Event("streams_shed", streams=n_ended, left_bytes=short.left, limit_bytes=short.limit))
            await asyncio.sleep(FREEING_S)
            await asyncio.to_thread(give_back)
        return not self._shortage()

    def _shortage(self) -> Room | None:
        """Return the available memory if it is short; None if it is sufficient or unknown."""
        now = self._room()
        if now is None or now.left >= min(MESSAGES_LEFT * self._max_message_bytes, SHARE_OF_LIMIT * now.limit):
            return None
        return now
