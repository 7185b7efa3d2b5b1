"""The scheduler: chooses the rows that the device runs next. Standard library only.

Callers form a ring, and the active requests of each a ring of their own. A chunk takes one row from each caller in
turn, of that caller's requests in turn, all of the head's key, and goes round again while there is room; newcomers join
the tail. So the first row of a caller waits for the running chunk and ⌈active callers ÷ chunk rows⌉ more, plus one for
each other key, however many requests and rows the others brought; and so do a caller's own requests among themselves.
"""

import contextlib
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Generic, Protocol, TypeVar

Row = TypeVar("Row")
Taken = TypeVar("Taken", covariant=True)


class Source(Protocol[Taken]):
    """A request in the ring."""

    @property
    def caller(self) -> str:
        """Who made it."""

    @property
    def key(self) -> Hashable:
        """What rows must share to run in one chunk: here, that of the next row. Asked only while `pending`."""

    @property
    def cancelled(self) -> bool:
        """Whether its remaining rows are to be dropped."""

    @property
    def pending(self) -> int:
        """How many rows can be taken now. There may be more, once those at the device have been folded."""

    def take(self) -> Taken:
        """Give the next row away. Called only while `pending`."""


class Ring(Generic[Row]):
    """The requests that have rows to run, in turn by caller.

    It is owned by the device worker, under whose lock every call is made.
    """

    def __init__(self) -> None:
        self._callers: dict[str, deque[Source[Row]]] = {}  # in turn; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._callers.values()))

    def add(self, request: Source[Row]) -> None:
        """Let a request join the tail. One without rows is passed over: it comes when it has some."""
        if request.pending:
            self._callers.setdefault(request.caller, deque()).append(request)

    def remove(self, request: Source[Row]) -> None:
        """Let a request go, if it is here."""
        if (requests := self._callers.get(request.caller)) is not None:
            with contextlib.suppress(ValueError):
                requests.remove(request)
            self._in_order(list(self._callers))

    def head(self) -> Source[Row] | None:
        """Return the request whose turn it is; the cancelled before it are dropped."""
        for requests in self._callers.values():
            while requests and requests[0].cancelled:
                requests.popleft()
        self._in_order(list(self._callers))
        return next((requests[0] for requests in self._callers.values()), None)

    def take_chunk(self, limit: int) -> list[Row]:
        """Take up to `limit` rows that can run together. Empty only if there is nothing to run."""
        chunk: list[Row] = []
        key: Hashable = None
        turns = deque(self._callers)
        others: dict[str, deque[Source[Row]]] = {caller: deque() for caller in turns}  # a caller's of another key
        served: dict[str, None] = {}
        passed: list[str] = []  # who have no more of this key
        while turns and len(chunk) < limit:
            caller = turns.popleft()
            requests = self._callers[caller]
            while requests and (requests[0].cancelled or (chunk and requests[0].key != key)):
                if not (request := requests.popleft()).cancelled:
                    others[caller].append(request)
            if not requests:
                passed.append(caller)
                continue
            request = requests.popleft()
            if not chunk:
                key = request.key
            chunk.append(request.take())
            served[caller] = None
            turns.append(caller)
            if request.pending:
                requests.append(request)
        # Whoever got no row keeps its place before those who did.
        for caller, kept in others.items():
            self._callers[caller].extendleft(reversed(kept))
        waiting = [caller for caller in passed if caller not in served]
        self._in_order([*waiting, *turns, *(caller for caller in passed if caller in served)])
        return chunk

    def _in_order(self, callers: Iterable[str]) -> None:
        """Keep the callers in this order, without those that have no request."""
        self._callers = {caller: requests for caller in callers if (requests := self._callers[caller])}
