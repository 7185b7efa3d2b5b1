"""Connections: the operating system's tables, of real connections and in the formats of other machines."""

import ipaddress
import socket
import sys
from pathlib import Path

import pytest
from sidelight_server.interop.open_inference.connections import connected_peers, peer_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")

HEADER = "  sl  local_address rem_address   st\n"


@pytest.mark.parametrize(
    ("family", "host", "grpc_host"),
    [(socket.AF_INET, "127.0.0.1", "ipv4:127.0.0.1"), (socket.AF_INET6, "::1", "ipv6:%5B::1%5D")],
)
def test_a_connection_counts_until_its_peer_closes_it(family: int, host: str, grpc_host: str) -> None:
    try:
        listening = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} here")
    with listening, socket.create_connection(listening.getsockname()[:2]) as client:
        accepted, (_, port, *_) = listening.accept()
        with accepted:
            peer = peer_of(f"{grpc_host}:{port}")
            assert peer in connected_peers()
            client.close()
            assert peer not in connected_peers()


def test_a_mapped_address_is_the_one_that_it_maps(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text(HEADER)
    mapped = "0000000000000000FFFF00000100000A:1388"
    (tmp_path / "tcp6").write_text(f"{HEADER}   0: {mapped} {mapped} 01\n")
    assert connected_peers(tmp_path) == {(ipaddress.ip_address("10.0.0.1"), 5000)} == {peer_of("ipv4:10.0.0.1:5000")}


def test_a_socket_that_is_not_established_is_no_connection(tmp_path: Path) -> None:
    for name in ("tcp", "tcp6"):
        (tmp_path / name).write_text(f"{HEADER}   0: 0100007F:1388 0100007F:1389 06\n")
    assert connected_peers(tmp_path) == set()


def test_without_the_tables_nothing_is_known(tmp_path: Path) -> None:
    assert connected_peers(tmp_path) is None


@pytest.mark.parametrize("peer", ["unix:", "unix:/run/socket", "unknown"])
def test_a_peer_without_an_address_is_no_connection(peer: str) -> None:
    assert peer_of(peer) is None
