"""The stream limit: how much each peer has open. A peer is a host; all UNIX socket callers are one."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from ..errors import ResourceExhausted

RETRY_DELAY_S = 1.0


class Peers:
    """Calls of one kind that each peer has open, bounded. It belongs to one event loop.

    `what` says what they are, and by which setting they are bounded.
    """

    def __init__(self, what: str, *, each: int, all_: int = 0) -> None:
        """Bound those of `each` peer, and of `all_` together; 0: without a bound."""
        self._what = what
        self._each = each
        self._all = all_
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def opens(self, peer: str) -> Iterator[None]:
        """Count a call of a peer, as gRPC names it, while it is open. `ResourceExhausted` for one too many."""
        host = host_of(peer)
        if self._each and self._open[host] >= self._each:
            raise self._too_many(f"{self._each} {self._what} of this peer")
        if self._all and self._open.total() >= self._all:
            raise self._too_many(f"{self._all} {self._what} of all peers")
        self._open[host] += 1
        try:
            yield
        finally:
            self._open[host] -= 1
            if not self._open[host]:
                del self._open[host]

    def _too_many(self, who: str) -> ResourceExhausted:
        return ResourceExhausted(f"{who} are open already; close one, or try later", retry_delay_s=RETRY_DELAY_S)


def host_of(peer: str) -> str:
    """Return the host of "ipv4:10.0.0.1:5000" or "ipv6:%5B::1%5D:5000". UNIX sockets do not tell who calls."""
    return peer if peer.startswith("unix:") else peer.rpartition(":")[0]
