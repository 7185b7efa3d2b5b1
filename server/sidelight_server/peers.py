"""Peers: how many streams each has open. A peer is the host that calls; callers over UNIX sockets are one together."""

import contextlib
from collections import Counter
from collections.abc import Iterator

from .errors import ResourceExhausted

RETRY_DELAY_S = 1.0


class Peers:
    """The streams of each peer, bounded. It belongs to one event loop."""

    def __init__(self, *, max_streams: int) -> None:
        """Without `max_streams`, 0, there is no bound."""
        self._max_streams = max_streams
        self._n_streams: Counter[str] = Counter()

    @contextlib.contextmanager
    def stream(self, peer: str) -> Iterator[None]:
        """Count a stream of a peer, as gRPC names it, while it is open. `ResourceExhausted` for one too many."""
        host = host_of(peer)
        if self._max_streams and self._n_streams[host] >= self._max_streams:
            raise ResourceExhausted(
                f"{self._max_streams} streams of this peer are open already (the server's max_peer_streams)",
                retry_delay_s=RETRY_DELAY_S,
            )
        self._n_streams[host] += 1
        try:
            yield
        finally:
            self._n_streams[host] -= 1
            if not self._n_streams[host]:
                del self._n_streams[host]


def host_of(peer: str) -> str:
    """Return the host of "ipv4:10.0.0.1:5000" or "ipv6:%5B::1%5D:5000". UNIX sockets do not tell who calls."""
    return peer if peer.startswith("unix:") else peer.rpartition(":")[0]
