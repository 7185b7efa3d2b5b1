"""The connection: whether the server is there. It follows the channel's state, so that a call need not ask."""

import logging
import threading

import grpc

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc

from ._errors import Unavailable

log = logging.getLogger("sidelight")

SILENT_WAIT_S = 1.0
PROBE_TIMEOUT_S = 10.0


class Connection:
    """Waits for the server where it is not there yet, or not any more."""

    def __init__(self, channel: grpc.Channel, stub: attribution_pb2_grpc.AttributionServiceStub, address: str) -> None:
        self._channel = channel
        self._stub = stub
        self._address = address
        self._changed = threading.Condition()
        self._state: grpc.ChannelConnectivity | None = None
        self._followed = False

    def wait(self, timeout_s: float) -> None:
        """Wait for the server. `Unavailable` when it has not come in time, or the client is closed."""
        with self._changed:
            self._try()
            if self._settled(min(timeout_s, SILENT_WAIT_S)):
                return
            log.warning("waiting for a server at %s", self._address)
            self._try()
            if not self._settled(timeout_s - SILENT_WAIT_S):
                raise Unavailable(
                    f"no server answers at {self._address} after {timeout_s:g} s; is sidelight-server running there?"
                )

    def close(self) -> None:
        """Stop following, and let those who wait go."""
        self._channel.unsubscribe(self._follow)
        self._follow(grpc.ChannelConnectivity.SHUTDOWN)

    def _try(self) -> None:
        """Make the channel connect. One whose server went away is idle: only a call makes it look for it again."""
        if self._state is grpc.ChannelConnectivity.IDLE:
            info = pb.GetServerInfoRequest()
            self._call = self._stub.GetServerInfo.future(info, timeout=PROBE_TIMEOUT_S, wait_for_ready=True)
        elif not self._followed and self._state is None:
            self._followed = True
            self._channel.subscribe(self._follow, try_to_connect=True)

    def _settled(self, timeout_s: float) -> bool:
        ends = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.SHUTDOWN)
        if not self._changed.wait_for(lambda: self._state in ends, min(max(0.0, timeout_s), threading.TIMEOUT_MAX)):
            return False
        if self._state is grpc.ChannelConnectivity.SHUTDOWN:
            raise Unavailable("the client is closed")
        return True

    def _follow(self, state: grpc.ChannelConnectivity) -> None:
        with self._changed:
            if self._state is not grpc.ChannelConnectivity.SHUTDOWN:  # what comes late cannot open a closed client
                self._state = state
            self._changed.notify_all()
