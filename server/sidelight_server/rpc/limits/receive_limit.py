"""The receive limit: how many messages may be received at once, and for how long.

gRPC buffers 64 KiB of a message until the handler reads it, and then all of it. The size of a message is known only
once it is complete, so the number of messages that are read at once is limited by slots.

gRPC joins the parts of a message on the event loop, which blocks it for 1 ms per MiB. So the next messages of a caller
whose large messages were rejected are read at a limited rate.
"""

import asyncio
import math
from typing import Any

import grpc

from ...errors import DeadlineExceeded, InvalidArgument, ResourceExhausted, SidelightError
from ..status import Context
from .admission import Admission, Permit
from .reading import read

_Slot = tuple[Admission, Permit]

SLOTS = 16
QUICK_S = 0.1  # time limit in a slot: together they hold no more than the network delivers in this time
SLOW_SLOTS = 8  # for messages that take longer
SMALL_SLOTS = 16  # for calls with small messages
SMALL_S = 1.0
RETRY_DELAY_S = 1.0
LARGE_BYTES = 2**20  # smaller rejected messages do not count
REFUSED_BYTES_PER_S = 128 * 2**20  # rate per caller: at most an eighth of the event loop's time
FORGOTTEN_S = 2.0  # after a caller's last rejected large message its messages are read at once again


class ReceiveLimit:
    """The receive slots of one kind of call. Used on the event loop only.

    Connections wait for a slot round-robin. If there are slow slots, a message that has not arrived after `QUICK_S`
    moves to one of them, or is rejected if none is free. So slow senders do not delay others, and a sender that has a
    slow slot can finish.
    """

    def __init__(self, pace: "Pace", *, slots: int, within_s: float, slow_slots: int = 0) -> None:
        """`within_s` 0 means no limit on how long a message may take to arrive."""
        self._pace = pace
        self._quick = Admission(max_requests=slots, max_bytes=math.inf)
        self._slow = Admission(max_requests=slow_slots, max_bytes=math.inf) if slow_slots else None
        self._within_s = within_s or None

    @property
    def n_slots(self) -> int:
        """Number of messages that are being received."""
        return self._quick.n_requests + (self._slow.n_requests if self._slow else 0)

    async def read(self, context: Context, caller: str) -> Any:
        """Return a call's message as its deserializer returned it, or the `SidelightError` to answer with.

        Where there are no slow slots, callers and not connections take turns: anybody may open many connections.
        """
        held: list[_Slot] = [(self._quick, await self._slot(context.peer() if self._slow else caller, caller))]
        timeout = asyncio.timeout(self._within_s)
        slowing_down = self._slow and asyncio.get_running_loop().call_later(
            QUICK_S, self._slow_down, self._slow, held, timeout, caller
        )
        try:
            async with timeout:
                message = await read(context)
        except TimeoutError:
            return self._timeout_error(has_slot=bool(held))
        finally:
            if slowing_down:
                slowing_down.cancel()
            for admission, permit in held:
                admission.release(permit)
        return InvalidArgument("message: missing, expected one message") if message is grpc.aio.EOF else message

    async def _slot(self, name: str, caller: str) -> Permit:
        """Wait for a slot. If a large message of the caller was rejected meanwhile, the pace is waited for again."""
        while True:
            rejected_s = await self._pace.wait(caller)
            permit = await self._quick.acquire(1, name)
            if self._pace.rejected_s(caller) == rejected_s:
                return permit
            self._quick.release(permit)

    def _slow_down(self, slow: Admission, held: list[_Slot], timeout: asyncio.Timeout, caller: str) -> None:
        """Move the message to a slow slot, or end the read if none is free."""
        if timeout.expired():
            return
        quick, permit = held.pop()
        quick.release(permit)
        if another := slow.try_acquire(1, caller):
            held.append((slow, another))
        else:
            timeout.reschedule(asyncio.get_running_loop().time())

    def _timeout_error(self, *, has_slot: bool) -> SidelightError:
        if has_slot:
            return DeadlineExceeded(f"message: not received within {self._within_s:g} s")
        return ResourceExhausted(
            "message: slow to arrive, and the server already receives as many slow messages as it allows",
            retry_delay_s=RETRY_DELAY_S,
        )


class Pace:
    """Limits the rate at which messages are read from callers whose large messages were just rejected.

    Used on the event loop only. Other callers are not delayed, and small rejected messages do not count.
    """

    def __init__(self) -> None:
        self._rejected: dict[str, _Rejected] = {}

    def refuse(self, caller: str, n_bytes: int) -> None:
        """Record that a caller's message was rejected after `n_bytes` of it had been read."""
        if n_bytes < LARGE_BYTES:
            return
        now_s = asyncio.get_running_loop().time()
        for name in [name for name, each in self._rejected.items() if not each.is_recent(now_s)]:
            del self._rejected[name]
        self._rejected.setdefault(caller, _Rejected()).add(n_bytes / REFUSED_BYTES_PER_S, now_s)

    def rejected_s(self, caller: str) -> float:
        """Return when a large message of the caller was last rejected, on the event loop's clock; 0 if never."""
        return rejected.at_s if (rejected := self._rejected.get(caller)) else 0.0

    async def wait(self, caller: str) -> float:
        """Wait until the caller's next message may be read, and return `rejected_s`.

        Calls of one caller pass one after the other.
        """
        loop = asyncio.get_running_loop()
        if (rejected := self._rejected.get(caller)) is None:
            return 0.0
        async with rejected.turn:
            if rejected.is_recent(loop.time()):
                await asyncio.sleep(max(0.0, rejected.next_s - loop.time()))
                rejected.next_s = loop.time() + rejected.interval_s
        return rejected.at_s


class _Rejected:
    """The last rejected large message of a caller. Times are the event loop's, in seconds."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.at_s = 0.0
        self.interval_s = 0.0  # between two messages of the caller
        self.next_s = 0.0  # when the next one may be read

    def add(self, interval_s: float, now_s: float) -> None:
        """Record another one."""
        self.at_s, self.interval_s = now_s, interval_s
        self.next_s = max(self.next_s, now_s + interval_s)

    def is_recent(self, now_s: float) -> bool:
        """Whether it still delays the caller's messages."""
        return now_s - self.at_s < FORGOTTEN_S
