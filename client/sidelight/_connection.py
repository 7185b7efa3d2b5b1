"""A connection: one server's channel and its calls, and whether the server is there."""

import contextlib
import re
import threading
from collections.abc import Callable

import grpc

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2_grpc

from ._errors import InvalidArgument
from ._frames import open_stream

PROBE_TIMEOUT_S = 10.0
# A server that is silent for as long as both together is gone: its machine died, or something between cut the wire.
KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 20.0, 10.0

_ADDRESS = re.compile(r"unix:.+|(?!\w+://).+:\d+")
_READY, _IDLE, _SHUTDOWN = (
    grpc.ChannelConnectivity.READY,
    grpc.ChannelConnectivity.IDLE,
    grpc.ChannelConnectivity.SHUTDOWN,
)


class Connection:
    """A channel to one server. It follows the channel's state, so that a call need not ask."""

    def __init__(self, address: str, *, max_message_bytes: int) -> None:
        if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
            raise InvalidArgument(f'address: got {address!r}, expected "host:port" or "unix:/path"')
        self.address = address
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),  # checked here, with a better message
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
                ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
                ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),  # a minute, if it is not said
                ("grpc.http2.max_pings_without_data", 0),  # a server at work on a long batch sends nothing
                # What is sent again is decided here: gRPC knows neither suspects nor deadlines of batches.
                ("grpc.enable_retries", 0),
                # Otherwise a second client of this process would share, and close, the first one's connection.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self.attribution = attribution_pb2_grpc.AttributionServiceStub(self._channel)
        self.open_stream = open_stream(self._channel)
        self.models = model_pb2_grpc.ModelServiceStub(self._channel)
        self._lock = threading.Lock()
        self._state: grpc.ChannelConnectivity | None = None
        self._is_followed = False
        self._listeners: list[Callable[[], None]] = []

    @property
    def state(self) -> grpc.ChannelConnectivity | None:
        """The channel's state; None before anybody looked for the server."""
        return self._state

    @property
    def is_ready(self) -> bool:
        """Whether the server is there."""
        return self._state is _READY

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._state is _SHUTDOWN

    def listen(self, listener: Callable[[], None]) -> None:
        """Call a function whenever the state changes, from a thread of gRPC's."""
        with self._lock:
            self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Call it no more."""
        with self._lock, contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    def seek(self) -> None:
        """Make the channel look for its server. One whose server went away is idle until a call is made."""
        with self._lock:
            state, first = self._state, not self._is_followed
            self._is_followed = True
        if first:
            self._channel.subscribe(self._follow, try_to_connect=True)
        elif state is _IDLE:
            info = pb.GetServerInfoRequest()
            with contextlib.suppress(ValueError):  # closed meanwhile
                self._probe = self.attribution.GetServerInfo.future(info, timeout=PROBE_TIMEOUT_S, wait_for_ready=True)

    def close(self) -> None:
        """End it, and whatever runs on it."""
        self._channel.unsubscribe(self._follow)
        self._follow(_SHUTDOWN)
        self._channel.close()

    def _follow(self, state: grpc.ChannelConnectivity) -> None:
        with self._lock:
            if self._state is _SHUTDOWN:  # what comes late cannot open a closed connection
                return
            self._state = state
            listeners = list(self._listeners)
        for listener in listeners:
            listener()
