"""The connection pool: distributes calls round-robin over the servers that are connected."""

import itertools
import logging
import threading
import time
from collections.abc import Sequence

from ..exceptions import InvalidArgument, Unavailable
from .channel import DIAGNOSE_EVERY_S, Connection
from .credentials import ChannelSecurity
from .process import Origin

log = logging.getLogger("sidelight")

WARN_AFTER_S = 1.0


class ConnectionPool:
    """One connection for each address."""

    def __init__(
        self,
        addresses: str | Sequence[str],
        *,
        max_message_bytes: int,
        security: ChannelSecurity = ChannelSecurity(),  # noqa: B008
    ) -> None:
        given = addresses.split(",") if isinstance(addresses, str) else addresses
        if not isinstance(given, list | tuple) or not given:
            raise InvalidArgument(
                f'address: got {addresses!r}, expected "host:port" or "unix:/path", or a list of them'
            )
        if len(set(given)) < len(given):
            raise InvalidArgument(f"address: got {list(given)}, expected each once")
        self.connections = [Connection(each, max_message_bytes=max_message_bytes, security=security) for each in given]
        self._origin = Origin()
        self._turn = itertools.count()
        self._changed = threading.Condition()
        for connection in self.connections:
            connection.listen(self._wake)

    @property
    def is_in_own_process(self) -> bool:
        """Whether this process created the connections, and is not a forked child of the one that did."""
        return self._origin.is_in_own_process

    @property
    def addresses(self) -> str:
        """All addresses, as text for messages."""
        return ", ".join(each.address for each in self.connections)

    def ready(self, timeout_s: float) -> Connection:
        """Return the next connected server, and wait for one if necessary. Raises `Unavailable` after the timeout."""
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
        """Return the next connected server; None if there is none. Raises `FailedPrecondition` in a forked child."""
        self._origin.check()
        first = next(self._turn)
        n = len(self.connections)
        return next((each for i in range(n) if (each := self.connections[(first + i) % n]).is_ready), None)

    def forget_errors(self) -> None:
        """Forget the connect errors of all connections: their causes may have been fixed since."""
        for connection in self.connections:
            connection.forget_error()

    def check(self) -> None:
        """Raise `Unavailable` if waiting is useless: TLS fails with every server, or the client is closed."""
        if any(each.is_closed for each in self.connections):
            raise Unavailable("the client is closed")
        faults = [each.connect_error for each in self.connections]
        if all(fault and fault.is_lasting for fault in faults):
            raise Unavailable(f"no connection to {self.addresses}: {self._reasons()}")

    def log_waiting(self) -> None:
        """Log that no server is connected yet, and why."""
        reasons = self._reasons()
        log.warning("waiting for a server at %s%s", self.addresses, f" ({reasons})" if reasons else "")

    def unavailable(self, timeout_s: float) -> Unavailable:
        """Return the error for having had no server during the timeout."""
        reasons = self._reasons()
        return Unavailable(
            f"no server answers at {self.addresses} after {timeout_s:g} s; is sidelight-server running there?"
            + (f" The last try: {reasons}" if reasons else "")
        )

    def close(self) -> None:
        """Close all connections. Waiting calls fail."""
        for connection in self.connections:
            connection.close()

    def _wait(self, timeout_s: float) -> Connection | None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            if found := self.ready_now():
                return found
            self.check()
            seen = self._states()
            for connection in self.connections:
                connection.connect()
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
