"""The receive limit: how many messages may be received at once, and for how long.

gRPC takes 64 KiB of a call whose message nobody reads, and all of it once somebody does. So messages are read in
places, of which there are as many as may take memory before they can be counted.

gRPC joins the parts of a message on the event loop: 1 ms for each MiB, in which nothing else is answered. So a caller
whose large messages are refused has the next ones read at a limited rate.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc

from ..errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, SidelightError
from .admission import Admission, Permit
from .status import Context

_Place = tuple[Admission, Permit]

PLACES = 32
QUICK_S = 0.1  # that a message may take there: all of them take no more memory than the network brings in that time
SLOW_PLACES = 8  # for those that take longer
SMALL_PLACES = 16  # of calls whose messages are small
SMALL_S = 1.0
RETRY_DELAY_S = 1.0
LARGE_BYTES = 2**20  # a refused message of fewer costs its caller nothing
REFUSED_BYTES_PER_S = 128 * 2**20  # of refused messages of one caller, which then take an eighth of the event loop


class ReceiveLimit:
    """The places of one kind of call. The event loop's.

    Connections wait for a place in turn. Where there are slow places, a message that has not arrived after `QUICK_S`
    must have one of those, or is refused: nobody waits for long behind slow callers, and who has one gets through.
    """

    def __init__(self, *, places: int, within_s: float, slow_places: int = 0) -> None:
        """Without `within_s`, 0, there is no bound on how long a message may take."""
        self._quick = Admission(max_requests=places, max_bytes=math.inf)
        self._slow = Admission(max_requests=slow_places, max_bytes=math.inf) if slow_places else None
        self._within_s = within_s or None

    @property
    def n_places(self) -> int:
        """How many messages are on their way in."""
        return self._quick.n_requests + (self._slow.n_requests if self._slow else 0)

    async def read(self, context: Context, caller: str) -> Any:
        """Return a call's message, as its deserializer makes it, or the `SidelightError` that there is instead."""
        held: list[_Place] = [(self._quick, await self._quick.acquire(1, context.peer()))]
        patience = asyncio.timeout(self._within_s)
        slowing_down = self._slow and asyncio.get_running_loop().call_later(
            QUICK_S, self._slow_down, self._slow, held, patience, caller
        )
        try:
            async with patience:
                message = await context.read()
        except TimeoutError:
            return self._why_not(has_place=bool(held))
        finally:
            if slowing_down:
                slowing_down.cancel()
            for admission, permit in held:
                admission.release(permit)
        return InvalidArgument("message: none came") if message is grpc.aio.EOF else message

    def _slow_down(self, slow: Admission, held: list[_Place], patience: asyncio.Timeout, caller: str) -> None:
        """Change to a slow place, or give up where there is none."""
        if patience.expired():
            return
        quick, permit = held.pop()
        quick.release(permit)
        if another := slow.take(1, caller):
            held.append((slow, another))
        else:
            patience.reschedule(asyncio.get_running_loop().time())

    def _why_not(self, *, has_place: bool) -> SidelightError:
        if has_place:
            return DeadlineExceeded(f"message: it has not arrived within {self._within_s:g} s")
        return ResourceExhausted(
            "message: it is slow to arrive, and as many slow ones as the server takes at once are on their way",
            retry_delay_s=RETRY_DELAY_S,
        )


class Pace:
    """The rate at which messages of callers whose large messages were refused are read. The event loop's.

    Other callers, and small messages, are not held up. The messages of such a caller are read one after the other.
    """

    def __init__(self) -> None:
        self._behind: dict[str, _Behind] = {}

    def refuse(self, caller: str, n_bytes: int) -> None:
        """Take note that a caller's message was refused, after so many bytes of it had been read."""
        if n_bytes < LARGE_BYTES:
            return
        now_s = asyncio.get_running_loop().time()
        for name in [name for name, each in self._behind.items() if each.until_s < now_s and not each.turn.locked()]:
            del self._behind[name]
        behind = self._behind.setdefault(caller, _Behind())
        behind.until_s = max(now_s, behind.until_s) + n_bytes / REFUSED_BYTES_PER_S

    async def wait(self, caller: str) -> None:
        """Wait until a caller's next message may be read."""
        behind = self._behind.get(caller)
        if behind and (left_s := behind.until_s - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(left_s)

    @contextlib.asynccontextmanager
    async def turn(self, caller: str) -> AsyncIterator[None]:
        """Wait likewise, and until no other message of the caller is being read."""
        if behind := self._behind.get(caller):
            async with behind.turn:
                await self.wait(caller)
                yield
        else:
            yield


class _Behind:
    """A caller whose large messages were refused."""

    def __init__(self) -> None:
        self.until_s = 0.0  # on the event loop's clock, before which no message of the caller is read
        self.turn = asyncio.Lock()
