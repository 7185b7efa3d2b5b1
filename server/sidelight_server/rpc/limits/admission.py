"""Admission control: permits by count, bytes and rows. A request holds its permit until its answer is written."""

import asyncio
import contextlib
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import ResourceExhausted

RETRY_DELAY_S = 0.25
SHARE = 3  # a caller must leave free at least its own holding divided by this
SMALL = 64  # a request is small if it takes at most max_bytes divided by this
SMALL_ROWS = 64  # and at most this many rows
RESERVE = 16  # max_requests and max_bytes divided by this are reserved for small requests, on top of the limits
LAST = 4  # the reserve divided by this is left for callers that hold at most one request


@dataclass(slots=True)
class Permit:
    """What one request holds. `is_extra`, `has_extra_bytes`: its count, its bytes come from the reserve."""

    caller: str
    n_bytes: int
    n_rows: int
    is_extra: bool
    has_extra_bytes: bool


@dataclass(slots=True)
class _Held:
    """The sum of the permits of one caller, or of all callers."""

    n_requests: int = 0
    n_extra: int = 0  # requests from the reserve
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


@dataclass(eq=False, slots=True)
class _Waiting:
    n_bytes: int
    n_rows: int
    turn: "asyncio.Future[Permit]"


class Admission:
    """The permits of a server or of one model, shared fairly among callers. Used on the event loop only: no lock.

    A caller that already holds permits gets another only if what stays free is at least a third of what it would then
    hold, so later callers find room. A caller that holds nothing may take everything that is free. Waiting callers are
    served round-robin, the requests of one caller in order. Only small requests overtake a request that needs more
    than is free: they take theirs from a reserve on top of the limits.
    """

    def __init__(self, *, max_requests: int, max_bytes: float, max_caller_rows: int = 0, limits: str = "") -> None:
        """`max_caller_rows` 0 means no limit. `limits` says in errors what is limited, and by which setting."""
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._max_caller_rows = max_caller_rows
        self._limits = limits
        self._waiting: dict[str, deque[_Waiting]] = {}  # by caller, in round-robin order
        self._held: defaultdict[str, _Held] = defaultdict(_Held)  # by caller
        self._total = _Held()

    @property
    def n_requests(self) -> int:
        """Number of requests that hold a permit."""
        return self._total.n_requests + self._total.n_extra

    @property
    def n_bytes(self) -> int:
        """Number of bytes that those requests and their answers take."""
        return self._total.n_bytes + self._total.n_extra_bytes

    @property
    def n_waiting(self) -> int:
        """Number of requests that wait for a permit."""
        return sum(map(len, list(self._waiting.values())))

    @contextlib.contextmanager
    def acquired(self, n_bytes: int, caller: str = "", *, n_rows: int = 0) -> Iterator[None]:
        """Hold a permit. Raises `ResourceExhausted` with a retry delay if none is free."""
        permit = self.acquire_now(n_bytes, caller, n_rows=n_rows)
        try:
            yield
        finally:
            self.release(permit)

    def acquire_now(self, n_bytes: int, caller: str = "", *, n_rows: int = 0) -> Permit:
        """Acquire a permit. Raises `ResourceExhausted` with a retry delay if none is free."""
        permit = self.try_acquire(n_bytes, caller, n_rows=n_rows)
        if permit is None:
            raise ResourceExhausted(self._refusal(caller, n_rows), retry_delay_s=RETRY_DELAY_S)
        return permit

    def try_acquire(self, n_bytes: int, caller: str = "", *, n_rows: int = 0) -> Permit | None:
        """Acquire a permit if one is free, else return None. Raises `ResourceExhausted` if it can never fit."""
        self._check_possible(n_bytes)
        is_in_turn = caller not in self._waiting and not any(map(self._lacks_bytes, self._waiting))
        permit = self._permit(caller, n_bytes, n_rows, is_in_turn=is_in_turn)
        if permit:
            self._add(permit)
        return permit

    async def acquire(self, n_bytes: int, caller: str = "", *, n_rows: int = 0) -> Permit:
        """Wait for a permit and acquire it. Raises `ResourceExhausted` if the request can never fit."""
        if permit := self.try_acquire(n_bytes, caller, n_rows=n_rows):
            return permit
        waiting = _Waiting(n_bytes, n_rows, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(caller, deque()).append(waiting)
        try:
            return await waiting.turn
        except asyncio.CancelledError:
            if waiting.turn.done() and not waiting.turn.cancelled():  # granted at the same moment: nobody will use it
                self.release(waiting.turn.result())
            else:
                self._leave(caller, waiting)
            raise

    def release(self, permit: Permit) -> None:
        """Return a permit, and grant waiting requests what fits now."""
        held = self._held[permit.caller]
        held.add(permit, sign=-1)
        self._total.add(permit, sign=-1)
        if not (held.n_requests or held.n_extra):
            del self._held[permit.caller]
        self._wake()

    def _add(self, permit: Permit) -> None:
        self._held[permit.caller].add(permit)
        self._total.add(permit)

    def _leave(self, caller: str, waiting: _Waiting) -> None:
        """Remove a waiting request whose wait was cancelled, and grant permits to those that it kept waiting."""
        queue = self._waiting.get(caller)
        if queue is None or waiting not in queue:
            return
        was_first = queue[0] is waiting
        queue.remove(waiting)
        if not queue:
            del self._waiting[caller]
        if was_first and (queue or waiting.n_bytes > self._max_bytes - self._total.n_bytes):
            self._wake()

    def _wake(self) -> None:
        """Grant permits round-robin until no waiting request fits."""
        while not self._is_full and any(map(self._grant, self._in_turn())):
            pass

    @property
    def _is_full(self) -> bool:
        """Whether no request fits, however small."""
        has_extra = self._total.n_extra < self._max_requests // RESERVE
        return self._total.n_requests >= self._max_requests and not has_extra

    def _in_turn(self) -> Iterator[tuple[str, bool]]:
        """Yield the waiting callers in order, each with whether no caller before it is short of bytes."""
        is_in_turn = True
        for caller, queue in list(self._waiting.items()):
            while queue and queue[0].turn.done():  # cancelled
                queue.popleft()
            if queue:
                yield caller, is_in_turn
                is_in_turn = is_in_turn and not self._lacks_bytes(caller)
            else:
                del self._waiting[caller]

    def _grant(self, of: tuple[str, bool]) -> bool:
        """Grant a permit to a caller's first request, or to a small one behind it; the caller's next turn is last."""
        caller, is_in_turn = of
        queue = self._waiting[caller]
        waiting = first = queue[0]
        permit = self._permit(caller, first.n_bytes, first.n_rows, is_in_turn=is_in_turn)
        if permit is None and not self._is_small(first.n_bytes, first.n_rows):
            small = (each for each in queue if self._is_small(each.n_bytes, each.n_rows) and not each.turn.done())
            waiting = next(small, first)
            permit = self._permit(caller, waiting.n_bytes, waiting.n_rows, is_in_turn=False)
        if permit is None:
            return False
        self._add(permit)
        queue.remove(waiting)
        waiting.turn.set_result(permit)
        del self._waiting[caller]
        if queue:
            self._waiting[caller] = queue
        return True

    def _is_small(self, n_bytes: int, n_rows: int) -> bool:
        return n_bytes <= self._max_bytes / SMALL and n_rows <= SMALL_ROWS

    def _permit(self, caller: str, n_bytes: int, n_rows: int, *, is_in_turn: bool) -> Permit | None:
        """Return the permit that a request can have now, or None. A small request may draw on the reserve."""
        held, total = self._held.get(caller, _Held()), self._total
        is_small = self._is_small(n_bytes, n_rows)
        n_after = held.n_rows + n_rows
        if not is_small and self._max_caller_rows and held.n_rows and n_after > self._max_caller_rows:
            return None
        has_count = _may_take(1, held.n_requests, self._max_requests - total.n_requests)
        has_bytes = is_in_turn and _may_take(n_bytes, held.n_bytes, self._max_bytes - total.n_bytes)
        if not is_small and not (has_count and has_bytes):
            return None
        extra, extra_bytes = self._max_requests // RESERVE, self._max_bytes / RESERVE
        if held.n_requests + held.n_extra > 1:
            extra, extra_bytes = extra - extra // LAST, extra_bytes - extra_bytes / LAST
        if not has_count and not _may_take(1, held.n_extra, extra - total.n_extra):
            return None
        if not has_bytes and not _may_take(n_bytes, held.n_extra_bytes, extra_bytes - total.n_extra_bytes):
            return None
        return Permit(caller, n_bytes, n_rows, is_extra=not has_count, has_extra_bytes=not has_bytes)

    def _lacks_bytes(self, caller: str) -> bool:
        """Whether a waiting caller holds no bytes and needs more than are free, so that others must not take them."""
        first = next((each for each in self._waiting[caller] if not each.turn.done()), None)
        has_none = caller not in self._held or not self._held[caller].n_bytes
        return first is not None and has_none and first.n_bytes > self._max_bytes - self._total.n_bytes

    def _refusal(self, caller: str, n_rows: int) -> str:
        held = self._held.get(caller, _Held())
        if self._limits:
            return f"{self._limits}: {self.n_requests} requests of {self.n_bytes} bytes are there already"
        if self._max_caller_rows and held.n_rows + n_rows > self._max_caller_rows and held.n_rows:
            return (
                f"this caller's requests in flight take up to {held.n_rows} rows, and this one {n_rows} more "
                f"(max_caller_rows {self._max_caller_rows})"
            )
        n_requests, n_bytes = held.n_requests + held.n_extra, held.n_bytes + held.n_extra_bytes
        return (
            f"the server has {self.n_requests} requests of {self.n_bytes} bytes in flight, of which this caller has "
            f"{n_requests} of {n_bytes} (max_in_flight {self._max_requests}, "
            f"max_in_flight_bytes {self._max_bytes}; a caller must leave free at least a third of what it holds)"
        )

    def _check_possible(self, n_bytes: int) -> None:
        if n_bytes < 1:  # a negative size would create room
            raise ValueError(f"a permit of {n_bytes} bytes")
        if n_bytes > self._max_bytes:
            raise ResourceExhausted(
                f"the request and its answer take {n_bytes} bytes, the server's max_in_flight_bytes is "
                f"{self._max_bytes}: send fewer examples"
            )


def _may_take(n: int, held: int, free: float) -> bool:
    """Whether a caller that holds `held` may take `n` of `free`: all of it if it holds none, else leaving a third."""
    return n <= free if not held else (held + n) // SHARE <= free - n
