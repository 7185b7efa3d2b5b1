"""The scheduler: whose rows the device runs next. Standard library only.

Active requests form a ring. A chunk takes one row from each in turn, all of the head's key, and goes round again while
there is room; newcomers join the tail. So a row waits for the running chunk and ⌈active requests ÷ chunk rows⌉ more,
plus one for each other key, however many rows its neighbours brought.
"""

from collections import deque
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar

Row = TypeVar("Row")
Taken = TypeVar("Taken", covariant=True)


class Source(Protocol[Taken]):
    """A request in the ring."""

    @property
    def key(self) -> Hashable:
        """What rows must share to run in one chunk."""

    @property
    def cancelled(self) -> bool:
        """Whether its remaining rows are to be dropped."""

    @property
    def pending(self) -> int:
        """How many rows have not been taken."""

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
        """Let a request join the tail. One without rows is passed over."""
        if request.pending:
            self._requests.append(request)

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
