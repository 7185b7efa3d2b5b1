"""The connection pool: the servers of a client, and the choice of one for each call."""

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence

from ..exceptions import InvalidArgument, Unavailable
from .balancing import least_loaded
from .channel import DIAGNOSE_EVERY_S, Connection
from .credentials import ChannelSecurity
from .process import Origin
from .resolver import Resolver, parse_name

log = logging.getLogger("sidelight")

ADDRESS_VARIABLE = "SIDELIGHT_ADDRESS"
WARN_AFTER_S = 1.0


def address_or_default(address: str | Sequence[str] | None) -> str | Sequence[str]:
    """Return the address, or by default that of the environment. Raises `InvalidArgument` if neither is set."""
    if address is not None:
        return address
    if default := os.environ.get(ADDRESS_VARIABLE):
        return default
    raise InvalidArgument(
        f'address: none was given and {ADDRESS_VARIABLE} is not set; call connect("host:port") or '
        f'connect("unix:/path"), or set {ADDRESS_VARIABLE}'
    )


class ConnectionPool:
    """One connection for each address, and for each address that a DNS name has now.

    `connections` is replaced when the addresses of a name change. A removed one is closed once nothing uses it.
    """

    def __init__(self, addresses: str | Sequence[str], *, max_message_bytes: int, security: ChannelSecurity) -> None:
        given = addresses.split(",") if isinstance(addresses, str) else addresses
        if not isinstance(given, list | tuple) or not given:
            raise InvalidArgument(
                f'address: got {addresses!r}, expected "host:port", "dns:host:port" or "unix:/path", or a list of them'
            )
        if len(set(given)) < len(given):
            raise InvalidArgument(f"address: got {list(given)}, expected each address once")
        self.addresses = ", ".join(map(str, given))
        self._connect = functools.partial(Connection, max_message_bytes=max_message_bytes, security=security)
        self._origin = Origin()
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._n_chosen = 0
        self._is_closed = False
        self._removed: list[Connection] = []
        self._fixed = [self._connect(each) for each in given if parse_name(each) is None]
        self.connections: tuple[Connection, ...] = tuple(self._fixed)
        for connection in self._fixed:
            connection.listen(self._wake)
        names = [name for each in given if (name := parse_name(each))]
        for host, port in names:
            security.check_token(f"{host}:{port}")
        self._resolver = Resolver(names, self._update) if names else None

    @property
    def is_in_own_process(self) -> bool:
        """Whether this process created the connections, and is not a forked child of the one that did."""
        return self._origin.is_in_own_process

    def ready(self, timeout_s: float) -> Connection:
        """Return a connected server, and wait for one if necessary. Raises `Unavailable` after the timeout."""
        if found := self.ready_now():
            return found
        self.forget_errors()
        deadline_s = time.monotonic() + timeout_s
        if found := self._wait(min(timeout_s, WARN_AFTER_S)):
            return found
        self.log_waiting()
        if found := self._wait(deadline_s - time.monotonic()):
            return found
        raise self.unavailable(timeout_s)

    def ready_now(self) -> Connection | None:
        """Return the least loaded connected server, or None. Raises `FailedPrecondition` in a forked child."""
        self._origin.check()
        connections = self.connections
        with self._changed:
            self._n_chosen += 1
            first = self._n_chosen % max(1, len(connections))
        turned = (*connections[first:], *connections[:first])
        return least_loaded([(each, each.load) for each in turned if each.is_ready], 1, time.monotonic())

    def listen(self, listener: Callable[[], None]) -> None:
        """Call a function after each change of a connection's state or of `connections`, from any thread."""
        with self._changed:
            self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        with self._changed, contextlib.suppress(ValueError):
            self._listeners.remove(listener)

    def connect(self) -> None:
        for connection in self.connections:
            connection.connect()

    def forget_errors(self) -> None:
        """Clear the connect errors of all connections: their causes may have been fixed since."""
        for connection in self.connections:
            connection.forget_error()

    def check(self) -> None:
        """Raise `Unavailable` if waiting is useless: TLS fails with every server, or the client is closed."""
        if self._is_closed:
            raise Unavailable("the client is closed")
        faults = [each.connect_error for each in self.connections]
        if faults and all(fault and fault.is_lasting for fault in faults):
            raise Unavailable(f"no connection to {self.addresses}: {self._reasons()}")

    def log_waiting(self) -> None:
        """Log that no server is connected yet, and why."""
        reasons = self._reasons()
        log.warning("waiting for a server at %s%s", self.addresses, f" ({reasons})" if reasons else "")

    def unavailable(self, timeout_s: float) -> Unavailable:
        """Return the error for a timeout without any server."""
        reasons = self._reasons()
        return Unavailable(
            f"no server answers at {self.addresses} after {timeout_s:g} s; is sidelight-server running there?"
            + (f" The last try: {reasons}" if reasons else "")
        )

    def close(self) -> None:
        """Close all connections. Waiting calls fail."""
        with self._changed:
            self._is_closed = True
        if self._resolver:
            self._resolver.close()
        for connection in (*self.connections, *self._removed):
            connection.close()
        self._wake()

    def _update(self, found: dict[str, str]) -> None:
        """Take the addresses that the names have now, each with its name. Called by the resolver's thread."""
        for connection in [each for each in self._removed if not each.is_used]:
            self._removed.remove(connection)
            connection.close()
        known = {each.address: each for each in self.connections[len(self._fixed) :]}
        if known.keys() == found.keys():
            return
        added = {address: self._connect(address, host=host) for address, host in found.items() if address not in known}
        removed = [each for address, each in known.items() if address not in found]
        with self._changed:
            if self._is_closed:
                return
            self.connections = (*self._fixed, *({**known, **added}[address] for address in found))
            self._removed += removed
        counts = len(self.connections), len(added), len(removed)
        log.info("%s: %d servers, %d of them new; %d removed", self.addresses, *counts)
        for connection in added.values():
            connection.listen(self._wake)
            connection.connect()
        self._wake()

    def _wait(self, timeout_s: float) -> Connection | None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            if found := self.ready_now():
                return found
            self.check()
            seen = self._states()
            self.connect()
            with self._changed:
                left_s = min(max(0.0, deadline_s - time.monotonic()), threading.TIMEOUT_MAX)
                until_look_s = min(left_s, DIAGNOSE_EVERY_S)
                changed = self._changed.wait_for(lambda: self._states() != seen, until_look_s)  # noqa: B023
            if not changed and left_s <= until_look_s:
                return None

    def _states(self) -> list[object]:
        return [(each.state, each.connect_error) for each in self.connections]

    def _reasons(self) -> str:
        return "; ".join(dict.fromkeys(each.connect_error.text for each in self.connections if each.connect_error))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
            listeners = list(self._listeners)
        for listener in listeners:
            listener()
