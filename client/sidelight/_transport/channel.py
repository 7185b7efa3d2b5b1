"""A connection: the channel to one server, its stubs and its connectivity state."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator

import grpc

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2_grpc

from ..exceptions import InvalidArgument
from ..results.attribution import Attribution
from .balancing import Load
from .connect_errors import ConnectError, diagnose
from .credentials import ChannelSecurity
from .wire import open_stream

PROBE_TIMEOUT_S = 10.0
JOIN_TIMEOUT_S = 1.0
DIAGNOSE_EVERY_S = 1.0  # while there is no server: gRPC reports only the first failed attempt
# After both together without a response the connection is dead: the host or the network is down.
KEEPALIVE_S, KEEPALIVE_TIMEOUT_S = 20.0, 10.0

_ADDRESS = re.compile(r"unix:.+|(?!\w+://).+:\d+")
_subscribing = threading.Lock()  # one at a time, so that each subscription finds its own thread
_READY, _IDLE, _FAILED, _SHUTDOWN = (
    grpc.ChannelConnectivity.READY,
    grpc.ChannelConnectivity.IDLE,
    grpc.ChannelConnectivity.TRANSIENT_FAILURE,
    grpc.ChannelConnectivity.SHUTDOWN,
)


class Connection:
    """A channel to one server. It subscribes to the channel's state, so that reading the state does not block.

    `host` is the name that the server's certificate is for, if the address is not.
    """

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        security: ChannelSecurity,
        host: str | None = None,
    ) -> None:
        if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
            raise InvalidArgument(f'address: got {address!r}, expected "host:port", "dns:host:port" or "unix:/path"')
        self.address = address
        self._is_encrypted = security.is_encrypted(address)
        self.load = Load()
        self._channel = security.channel(
            address,
            host=host,
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", -1),  # checked here, with a better message
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.keepalive_time_ms", int(KEEPALIVE_S * 1000)),
                ("grpc.keepalive_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),
                ("grpc.http2.ping_timeout_ms", int(KEEPALIVE_TIMEOUT_S * 1000)),  # the default is a minute
                ("grpc.http2.max_pings_without_data", 0),  # a server sends nothing while it computes a long batch
                # The client retries by itself: gRPC has no concept of suspects or of deadlines of batches.
                ("grpc.enable_retries", 0),
                # Otherwise a second client in this process would share the first one's connection, and close it.
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        channel = security.authorized(self._channel)
        self.attribution = attribution_pb2_grpc.AttributionServiceStub(channel)
        self.open_stream = open_stream(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)
        self._n_users = 0  # calls and workers
        self._lock = threading.Lock()
        self.state: grpc.ChannelConnectivity | None = None  # None before the first `connect`
        self._is_followed = False
        self._followers: list[threading.Thread] = []  # gRPC's threads that watch the channel's state
        self.connect_error: ConnectError | None = None  # why the last attempt failed
        self._diagnosed_s = -DIAGNOSE_EVERY_S  # when `_diagnose` last made a call
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_ready(self) -> bool:
        return self.state is _READY

    @property
    def is_closed(self) -> bool:
        return self.state is _SHUTDOWN

    @property
    def is_used(self) -> bool:
        return bool(self._n_users)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Keep the connection open meanwhile, even if its server is no longer listed."""
        with self._lock:
            self._n_users += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_users -= 1

    @contextlib.contextmanager
    def calling(self, n_examples: int) -> Iterator[None]:
        """Keep the connection open during a unary call, and count its examples in the server's load."""
        self.load.sent(n_examples)
        try:
            with self.used():
                yield
        finally:
            self.load.ended(n_examples)

    def record_load(self, answer: Attribution) -> None:
        if timing := answer.timing:
            self.load.record(
                len(answer), compute_s=timing.compute_s, backlog_s=timing.backlog_s, now_s=time.monotonic()
            )

    def listen(self, listener: Callable[[], None]) -> None:
        """Call a function after each state change, from a thread of gRPC's."""
        with self._lock:
            self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    def forget_error(self) -> None:
        """Clear the last connect error: its cause may have been fixed since."""
        with self._lock:
            self.connect_error = None
            self._diagnosed_s = -DIAGNOSE_EVERY_S

    def connect(self) -> None:
        """Start connecting. A channel that lost its server is idle until the next call, so this makes one."""
        with self._lock:
            state, first = self.state, not self._is_followed
            self._is_followed = True
        if first:
            with _subscribing:
                before = set(threading.enumerate())
                self._channel.subscribe(self._follow, try_to_connect=True)
                begun = set(threading.enumerate()) - before
                self._followers = [thread for thread in begun if thread.daemon]
        elif state is _FAILED:
            self._diagnose()
        elif state is _IDLE:
            info = pb.GetServerInfoRequest()
            with contextlib.suppress(ValueError):  # closed meanwhile
                self._probe = self.attribution.GetServerInfo.future(info, timeout=PROBE_TIMEOUT_S, wait_for_ready=True)

    def close(self) -> None:
        """Close the channel and end its calls."""
        self._channel.unsubscribe(self._follow)
        self._follow(_SHUTDOWN)
        self._join_followers()
        self._channel.close()

    def _follow(self, state: grpc.ChannelConnectivity) -> None:
        with self._lock:
            if self.state is _SHUTDOWN:  # a late callback must not reopen a closed connection
                return
            self.state = state
            if state is _READY:
                self.connect_error = None
        self._notify()
        if state is _FAILED:
            self._diagnose()

    def _notify(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()

    def _diagnose(self) -> None:
        """Make a call that fails at once, to learn why there is no server: gRPC reports the reason only to calls."""
        with self._lock:
            now_s = time.monotonic()
            if self.address.startswith("unix:") or now_s < self._diagnosed_s + DIAGNOSE_EVERY_S:
                return
            self._diagnosed_s = now_s
        stub = attribution_pb2_grpc.AttributionServiceStub(self._channel)  # it needs no token
        with contextlib.suppress(ValueError):  # closed meanwhile
            self._trial = stub.GetServerInfo.future(pb.GetServerInfoRequest(), timeout=PROBE_TIMEOUT_S)
            self._trial.add_done_callback(self._diagnosed)

    def _diagnosed(self, call: "grpc.Future[pb.GetServerInfoResponse]") -> None:
        with self._lock:
            if not isinstance(call, grpc.Call) or call.code() is not grpc.StatusCode.UNAVAILABLE or self.is_ready:
                return
            self.connect_error = diagnose(call.details() or "", is_encrypted=self._is_encrypted)
        self._notify()

    def _join_followers(self) -> None:
        """Wait until gRPC's thread that watches the channel's state has ended, which it does after the unsubscription.

        It polls every 0.2 s, and fails in `threading.excepthook` if the channel is closed between two polls. The wait
        is limited, since `_followers` may contain an unrelated thread that was started at the same moment.
        """
        until_s = time.monotonic() + JOIN_TIMEOUT_S
        for thread in self._followers:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until_s - time.monotonic()))
