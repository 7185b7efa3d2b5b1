"""The limit on open streams per peer. A peer is a host; all callers over UNIX sockets are one peer."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from ..errors import ResourceExhausted

RETRY_DELAY_S = 1.0


class Peers:
    """Counts and limits the open calls of one kind per peer. Used on one event loop only.

    `what` describes the calls and the setting that limits them, for errors.
    """

    def __init__(self, what: str, *, each: int, all_: int = 0) -> None:
        """Limit the open calls of `each` peer, and of `all_` peers together; 0: no limit."""
        self._what = what
        self._each = each
        self._all = all_
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def opens(self, peer: str) -> Iterator[None]:
        """Count a call of a gRPC peer while the context is open. Raises `ResourceExhausted` above a limit."""
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
    """Return the host of "ipv4:10.0.0.1:5000" or "ipv6:%5B::1%5D:5000"; a UNIX socket peer as it is."""
    return peer if peer.startswith("unix:") else peer.rpartition(":")[0]
