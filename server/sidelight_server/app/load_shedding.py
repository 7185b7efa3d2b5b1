"""Load shedding: ends streams that wait for a message while memory is short.

gRPC holds a message that is still arriving, says nothing of it, and lets Python set no limit to all of them together. A
stream can be ended at any time without a loss: what was read is answered, and its caller opens another. That frees what
has arrived of its next message.
"""

import asyncio
import logging
from collections.abc import Callable

from ..compute.host_memory import Room, give_back, room
from ..telemetry.logs import Event

log = logging.getLogger("sidelight")

EVERY_S = 0.25  # between two looks; as long must a stream have waited, so that one in steady use is left alone
FREEING_S = 0.25  # until streams that were told to end have ended
VAIN_PAUSE_S = 5.0  # after streams were ended and memory is still short: others hold it
MESSAGES_LEFT = 4  # of the largest size: below it memory is short. A network of 10 Gbit/s brings as much between looks
SHARE_OF_LIMIT = 0.25  # but no more of it than this: a small server that idles is not short of memory


class LoadShedding:
    """Looks at the memory that is left, and ends streams that wait for a message while it is short. The event loop's.

    What the C library keeps of freed memory is given back first: it may be all that is missing.
    """

    def __init__(
        self,
        end_waiting: Callable[[float], int],
        *,
        max_message_bytes: int,
        room: Callable[[], Room | None] = room,
    ) -> None:
        """`end_waiting` ends the streams that have waited for so many seconds, and returns how many these were."""
        self._end_waiting = end_waiting
        self._max_message_bytes = max_message_bytes
        self._room = room

    async def run(self) -> None:
        """Look, again and again, until cancelled."""
        while True:
            pause_s = EVERY_S if await self.look() else VAIN_PAUSE_S
            await asyncio.sleep(pause_s)

    async def look(self) -> bool:
        """Look once, and end streams if need be. False where memory is short all the same."""
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
        """Return the memory that is left where that is too little; None where it is enough, or nothing tells."""
        now = self._room()
        if now is None or now.left >= min(MESSAGES_LEFT * self._max_message_bytes, SHARE_OF_LIMIT * now.limit):
            return None
        return now
