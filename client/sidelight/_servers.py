"""The servers that a client knows: each call goes to the next of those that are there."""

import itertools
import logging
import threading
import time
from collections.abc import Sequence

from ._connection import Connection
from ._errors import InvalidArgument, Unavailable

log = logging.getLogger("sidelight")

SILENT_WAIT_S = 1.0


class Servers:
    """One connection for each address."""

    def __init__(self, addresses: str | Sequence[str], *, max_message_bytes: int) -> None:
        given = addresses.split(",") if isinstance(addresses, str) else addresses
        if not isinstance(given, list | tuple) or not given:
            raise InvalidArgument(
                f'address: got {addresses!r}, expected "host:port" or "unix:/path", or a list of them'
            )
        if len(set(given)) < len(given):
            raise InvalidArgument(f"address: got {list(given)}, expected each once")
        self.connections = [Connection(each, max_message_bytes=max_message_bytes) for each in given]
        self._turn = itertools.count()
        self._changed = threading.Condition()
        for connection in self.connections:
            connection.listen(self._wake)

    @property
    def names(self) -> str:
        """The addresses, to be told."""
        return ", ".join(each.address for each in self.connections)

    def ready(self, timeout_s: float) -> Connection:
        """Return the next server that is there, after waiting for one. `Unavailable` when none has come in time."""
        if found := self.ready_now():
            return found
        deadline_s = time.monotonic() + timeout_s
        if found := self._wait(min(timeout_s, SILENT_WAIT_S)):
            return found
        log.warning("waiting for a server at %s", self.names)
        if found := self._wait(deadline_s - time.monotonic()):
            return found
        raise absent(self.names, timeout_s)

    def ready_now(self) -> Connection | None:
        """Return the next server that is there; None where there is none."""
        first = next(self._turn)
        n = len(self.connections)
        return next((each for i in range(n) if (each := self.connections[(first + i) % n]).is_ready), None)

    def close(self) -> None:
        """End all connections. Those who wait are let go."""
        for connection in self.connections:
            connection.close()

    def _wait(self, timeout_s: float) -> Connection | None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            if any(each.is_closed for each in self.connections):
                raise Unavailable("the client is closed")
            if found := self.ready_now():
                return found
            seen = self._states()
            for connection in self.connections:
                connection.seek()
            with self._changed:
                left_s = min(max(0.0, deadline_s - time.monotonic()), threading.TIMEOUT_MAX)
                if not self._changed.wait_for(lambda: self._states() != seen, left_s):  # noqa: B023
                    return None

    def _states(self) -> list[object]:
        return [each.state for each in self.connections]

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def absent(names: str, timeout_s: float) -> Unavailable:
    """Return what to say where nobody answers."""
    return Unavailable(f"no server answers at {names} after {timeout_s:g} s; is sidelight-server running there?")
