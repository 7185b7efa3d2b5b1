"""Connections: which TCP peers of this machine are still connected, from Linux's tables of connections.

gRPC reports the end of a call to a server, but not the end of a connection.
"""

import ipaddress
from pathlib import Path
from urllib.parse import unquote

ESTABLISHED = "01"

Peer = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]


def peer_of(peer: str) -> Peer | None:
    """Return the address and port of a gRPC peer, "ipv4:10.0.0.1:5000" or "ipv6:%5B::1%5D:5000"; None for others."""
    kind, _, rest = peer.partition(":")
    host, _, port = unquote(rest).rpartition(":")
    if kind not in ("ipv4", "ipv6"):
        return None
    return _unmapped(ipaddress.ip_address(host.strip("[]").partition("%")[0])), int(port)


def connected_peers(tables: Path = Path("/proc/self/net")) -> set[Peer] | None:
    """Return the peers of all established TCP connections; None if they are unknown."""
    peers: set[Peer] = set()
    try:
        for name in ("tcp", "tcp6"):
            for line in (tables / name).read_text().splitlines()[1:]:
                _, _, remote, state = line.split()[:4]
                if state == ESTABLISHED:
                    peers.add(_parsed(remote))
    except OSError:
        return None
    return peers


def _parsed(address: str) -> Peer:
    """Parse "0100007F:C383": an address as 32-bit words in the machine's byte order, and a port."""
    words, _, port = address.partition(":")
    packed = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
    return _unmapped(ipaddress.ip_address(packed)), int(port, 16)


def _unmapped(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
