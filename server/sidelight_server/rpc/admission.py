"""Admission: permits by count and by bytes. A request holds its permit until its answer is written."""

import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import ResourceExhausted

RETRY_DELAY_S = 0.25
SHARE = 3  # a caller leaves free at least what it holds divided by this
SMALL = 64  # a request is small that takes at most the bytes divided by this, and
SMALL_ROWS = 64  # at most so many rows
RESERVE = 16  # permits and bytes divided by this are kept for small requests, beside the others


@dataclass(frozen=True, slots=True)
class Permit:
    """What a request holds: its count, and its bytes, may each be of the reserve."""

    caller: str
    n_bytes: int
    n_rows: int
    is_extra: bool
    has_extra_bytes: bool


@dataclass(slots=True)
class _Held:
    """What one caller holds, or all of them."""

    n_requests: int = 0
    n_extra: int = 0  # requests of the reserve
    n_bytes: int = 0
    n_extra_bytes: int = 0
    n_rows: int = 0

    def add(self, permit: Permit, *, sign: int = 1) -> None:
        self.n_rows += sign * permit.n_rows
        if permit.is_extra:
            self.n_extra += sign
        else:
            self.n_requests += sign
        if permit.has_extra_bytes:
            self.n_extra_bytes += sign * permit.n_bytes
        else:
            self.n_bytes += sign * permit.n_bytes


@dataclass(slots=True)
class _Waiting:
    n_bytes: int
    n_rows: int
    turn: "asyncio.Future[Permit]"


class Admission:
    """The permits of a server, or of one of its models, shared out by caller. The event loop's: no lock.

    A caller who holds something takes more only while a third of what it would hold stays free: nobody can take all,
    and those who come later find room. One who holds nothing may take all there is. Callers wait in turn, and each
    caller's requests one behind the other. A request that needs more bytes than are free is not overtaken, but by
    small ones: those have a reserve, without which the large one would not be let in any sooner.
    """

    def __init__(self, *, max_requests: int, max_bytes: float, max_caller_rows: int = 0, model: str = "") -> None:
        """Without `max_caller_rows`, 0, there is no bound on them."""
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._max_caller_rows = max_caller_rows
        self._model = model
        self._waiting: dict[str, deque[_Waiting]] = {}  # by caller, in turn
        self._held: defaultdict[str, _Held] = defaultdict(_Held)  # by caller
        self._total = _Held()

    @property
    def n_requests(self) -> int:
        """How many requests hold a permit."""
        return self._total.n_requests + self._total.n_extra

    @property
    def n_bytes(self) -> int:
        """How many bytes they and their answers take."""
        return self._total.n_bytes + self._total.n_extra_bytes

    @contextlib.contextmanager
    def enter(self, n_bytes: int, caller: str = "", *, n_rows: int = 0) -> Iterator[None]:
        """Hold a permit. `ResourceExhausted`, with a retry delay, where there is none now."""
        permit = self.take(n_bytes, caller, n_rows=n_rows)
        if permit is None:
            raise ResourceExhausted(self._why_not(caller, n_rows), retry_delay_s=RETRY_DELAY_S)
        try:
            yield
        finally:
            self.release(permit)

    def take(self, n_bytes: int, caller: str = "", *, n_rows: int = 0) -> Permit | None:
        """Take a permit if there is one now; `release` gives it back. `ResourceExhausted` where there can never be."""
        self._refuse_impossible(n_bytes)
        is_in_turn = caller not in self._waiting and not any(map(self._lacks_bytes, self._waiting))
        permit = self._permit(caller, n_bytes, n_rows, is_in_turn=is_in_turn)
        if permit:
            self._add(permit)
        return permit

    async def acquire(self, n_bytes: int, caller: str = "", *, n_rows: int = 0) -> Permit:
        """Wait for a permit and take it; `release` gives it back. `ResourceExhausted` where there can never be one."""
        if permit := self.take(n_bytes, caller, n_rows=n_rows):
            return permit
        waiting = _Waiting(n_bytes, n_rows, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(caller, deque()).append(waiting)
        try:
            return await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled():  # it came in the same moment, for nobody
                self.release(waiting.turn.result())
            else:
                self._wake()
            raise

    def release(self, permit: Permit) -> None:
        """Give a permit back."""
        held = self._held[permit.caller]
        held.add(permit, sign=-1)
        self._total.add(permit, sign=-1)
        if not (held.n_requests or held.n_extra):
            del self._held[permit.caller]
        self._wake()

    def _add(self, permit: Permit) -> None:
        self._held[permit.caller].add(permit)
        self._total.add(permit)

    def _wake(self) -> None:
        """Let callers take their turns, until none can."""
        while any(map(self._let_in, self._in_turn())):
            pass

    def _in_turn(self) -> list[tuple[str, bool]]:
        """Return who waits, in turn, and whether nobody before them lacks bytes."""
        callers: list[tuple[str, bool]] = []
        is_in_turn = True
        for caller, queue in list(self._waiting.items()):
            while queue and queue[0].turn.done():  # by a cancel
                queue.popleft()
            if queue:
                callers.append((caller, is_in_turn))
                is_in_turn = is_in_turn and not self._lacks_bytes(caller)
            else:
                del self._waiting[caller]
        return callers

    def _let_in(self, of: tuple[str, bool]) -> bool:
        """Let a caller's first request in, if it can be; the caller's next turn comes after all others'."""
        caller, is_in_turn = of
        queue = self._waiting[caller]
        permit = self._permit(caller, queue[0].n_bytes, queue[0].n_rows, is_in_turn=is_in_turn)
        if permit is None:
            return False
        self._add(permit)
        queue.popleft().turn.set_result(permit)
        del self._waiting[caller]
        if queue:
            self._waiting[caller] = queue
        return True

    def _permit(self, caller: str, n_bytes: int, n_rows: int, *, is_in_turn: bool) -> Permit | None:
        """Return what a request can have now; what it cannot have in its turn, a small one can have of the reserve."""
        held, total = self._held.get(caller, _Held()), self._total
        is_small = n_bytes <= self._max_bytes / SMALL and n_rows <= SMALL_ROWS
        n_after = held.n_rows + n_rows
        if not is_small and self._max_caller_rows and held.n_rows and n_after > self._max_caller_rows:
            return None
        has_count = _may_take(1, held.n_requests, self._max_requests - total.n_requests)
        has_bytes = is_in_turn and _may_take(n_bytes, held.n_bytes, self._max_bytes - total.n_bytes)
        if not is_small and not (has_count and has_bytes):
            return None
        extra, extra_bytes = self._max_requests // RESERVE, self._max_bytes / RESERVE
        if not has_count and not _may_take(1, held.n_extra, extra - total.n_extra):
            return None
        if not has_bytes and not _may_take(n_bytes, held.n_extra_bytes, extra_bytes - total.n_extra_bytes):
            return None
        return Permit(caller, n_bytes, n_rows, is_extra=not has_count, has_extra_bytes=not has_bytes)

    def _lacks_bytes(self, caller: str) -> bool:
        """Whether a caller who waits holds no bytes and needs more than are free: others must not take those first."""
        first = next((each for each in self._waiting[caller] if not each.turn.done()), None)
        has_none = caller not in self._held or not self._held[caller].n_bytes
        return first is not None and has_none and first.n_bytes > self._max_bytes - self._total.n_bytes

    def _why_not(self, caller: str, n_rows: int) -> str:
        held = self._held.get(caller, _Held())
        if self._model:
            return f'model "{self._model}" is at work on {self.n_requests} requests (max_model_in_flight)'
        if self._max_caller_rows and held.n_rows + n_rows > self._max_caller_rows and held.n_rows:
            return (
                f"this caller's requests at work may take {held.n_rows} rows, and this one {n_rows} more "
                f"(max_caller_rows {self._max_caller_rows})"
            )
        n_requests, n_bytes = held.n_requests + held.n_extra, held.n_bytes + held.n_extra_bytes
        return (
            f"the server is at work on {self.n_requests} requests of {self.n_bytes} bytes, of which this caller has "
            f"{n_requests} of {n_bytes} (max_in_flight {self._max_requests}, "
            f"max_in_flight_bytes {self._max_bytes}; a caller leaves a third of what it has free)"
        )

    def _refuse_impossible(self, n_bytes: int) -> None:
        if n_bytes < 1:  # a negative one would give room to others
            raise ValueError(f"a permit of {n_bytes} bytes")
        if n_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"the request and its answer take {n_bytes} bytes, the server's max_in_flight_bytes is "
                f"{self._max_bytes}: send fewer examples"
            )


def _may_take(n: int, held: int, free: float) -> bool:
    """Whether one who holds some may take more of what is free, and leaves enough of it."""
    return n <= free if not held else (held + n) // SHARE <= free - n
