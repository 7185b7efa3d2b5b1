"""The scheduler: assembles each chunk by choosing the rows that the device runs next. Standard library only.

Fair round-robin at two levels: over callers, and over the active requests of each caller. A chunk takes one row from
each caller in turn, all with the key of the first row, and repeats the round while it has room; new requests join the
tail. So a caller's first row waits for the running chunk and ⌈active callers ÷ chunk rows⌉ more, plus one for each
other key and at most the batching delay, however many requests and rows other callers have. The same bound holds
among the requests of one caller.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Generic, Protocol, TypeVar

Row = TypeVar("Row")
Taken = TypeVar("Taken", covariant=True)


class RowSource(Protocol[Taken]):
    """A request of the scheduler."""

    @property
    def caller(self) -> str:
        """The caller that the request belongs to."""

    @property
    def key(self) -> Hashable:
        """The key of the next row; rows of one chunk share it. Read only while `pending`."""

    @property
    def cancelled(self) -> bool:
        """Whether its remaining rows will be dropped."""

    @property
    def pending(self) -> int:
        """Number of rows that can be taken now. More may follow once rows in flight have been folded."""

    def take(self) -> Taken:
        """Return the next row. Called only while `pending`."""


class Scheduler(Generic[Row]):
    """The ring of requests that have rows to run, in round-robin order by caller.

    Owned by the device worker, which makes every call under its lock.
    """

    def __init__(self) -> None:
        self._callers: dict[str, deque[RowSource[Row]]] = {}  # in round-robin order; no deque is empty

    def __len__(self) -> int:
        return sum(map(len, self._callers.values()))

    def n_rows(self, *, at_most: int) -> int:
        """Return how many rows can be taken now, counting no further than `at_most`."""
        n_rows = 0
        for request in itertools.chain.from_iterable(self._callers.values()):
            n_rows += request.pending
            if n_rows >= at_most:
                return at_most
        return n_rows

    def add(self, request: RowSource[Row]) -> None:
        """Add a request at the tail of its caller. Does nothing if it has no rows that can be taken."""
        if request.pending:
            self._callers.setdefault(request.caller, deque()).append(request)

    def remove(self, request: RowSource[Row]) -> None:
        if (requests := self._callers.get(request.caller)) is not None:
            with contextlib.suppress(ValueError):
                requests.remove(request)
            self._reorder(list(self._callers))

    def first(self) -> RowSource[Row] | None:
        """Return the request that is next, after removing cancelled ones before it; None if there is none."""
        for requests in self._callers.values():
            while requests and requests[0].cancelled:
                requests.popleft()
        self._reorder(list(self._callers))
        return next((requests[0] for requests in self._callers.values()), None)

    def take_chunk(self, limit: int) -> list[Row]:
        """Take up to `limit` rows that can run together. Empty only if there is nothing to run."""
        chunk: list[Row] = []
        key: Hashable = None
        turns = deque(self._callers)
        others: dict[str, deque[RowSource[Row]]] = {
            caller: deque() for caller in turns
        }  # requests that were skipped, for their key
        served: dict[str, None] = {}
        passed: list[str] = []  # callers without another request of this key
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
        # Callers and requests that got no row stay ahead of those that did.
        for caller, kept in others.items():
            self._callers[caller].extendleft(reversed(kept))
        waiting = [caller for caller in passed if caller not in served]
        self._reorder([*waiting, *turns, *(caller for caller in passed if caller in served)])
        return chunk

    def _reorder(self, callers: Iterable[str]) -> None:
        """Reorder the callers, dropping those without requests."""
        self._callers = {caller: requests for caller in callers if (requests := self._callers[caller])}
