"""The scheduler: whose rows the device runs next. Standard library only.

Active requests form a ring. A chunk takes one row from each in turn, all of the head's key, and goes round again while
there is room; newcomers join the tail. So a row waits for the running chunk and ⌈active requests ÷ chunk rows⌉ more,
plus one for each other key, however many rows its neighbours brought.
"""

import contextlib
from collections import deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

Row = TypeVar("Row")
Taken = TypeVar("Taken", covariant=True)


class Source(Protocol[Taken]):
    """A request in the ring."""

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
    """The requests that have rows to run, in turn.

    It is owned by the runner, under whose lock every call is made.
    """

    def __init__(self) -> None:
        self._requests: deque[Source[Row]] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Source[Row]) -> None:
        """Let a request join the tail. One without rows is passed over: it comes when it has some."""
        if request.pending:
            self._requests.append(request)

    def remove(self, request: Source[Row]) -> None:
        """Let a request go, if it is here."""
        with contextlib.suppress(ValueError):
            self._requests.remove(request)

    def head(self) -> Source[Row] | None:
        """Return the request whose turn it is; the cancelled before it are dropped."""
        while self._requests and self._requests[0].cancelled:
            self._requests.popleft()
        return self._requests[0] if self._requests else None

    def take_chunk(self, limit: int) -> list[Row]:
        """Take up to `limit` rows that can run together. Empty only if there is nothing to run."""
        chunk: list[Row] = []
        others: deque[Source[Row]] = deque()  # of another key: they keep their place before those who got a row
        key: Hashable = None
        while self._requests and len(chunk) < limit:
            request = self._requests.popleft()
            if request.cancelled:
                continue
            if not chunk:
                key = request.key
            if request.key != key:
                others.append(request)
                continue
            chunk.append(request.take())
            if request.pending:
                self._requests.append(request)
        self._requests.extendleft(reversed(others))
        return chunk
