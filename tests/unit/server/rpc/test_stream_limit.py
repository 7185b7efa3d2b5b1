"""The limit on the streams of a host: which peers are one host, and what is counted."""

import grpc
import pytest
import sidelight_server
from sidelight_server.security.stream_limit import Peers, host_of

PEERS = {
    "ipv4:10.0.0.1:5000": "ipv4:10.0.0.1",
    "ipv6:%5B::1%5D:5000": "ipv6:%5B::1%5D",
    "unix:": "unix:",
    "unix:/run/a:1": "unix:/run/a:1",
}


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_is_a_host(peer: str) -> None:
    assert host_of(peer) == PEERS[peer]


def test_each_host_has_streams_of_its_own() -> None:
    peers = Peers("streams", each=1)
    with peers.opens("ipv4:10.0.0.1:1"), peers.opens("ipv4:10.0.0.2:1"):
        with pytest.raises(sidelight_server.SidelightError) as caught, peers.opens("ipv4:10.0.0.1:2"):
            pass
        assert caught.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    with peers.opens("ipv4:10.0.0.1:3"):
        pass
