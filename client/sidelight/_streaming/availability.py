"""Availability: which servers have accepted a stream's call, and how long none has."""

import logging
from collections.abc import Callable, Hashable

from ..exceptions import ResourceExhausted, SidelightError, Unavailable

log = logging.getLogger("sidelight")

WARN_AFTER_S = 1.0


class Availability:
    """The live workers of a stream, those whose server has accepted a call.

    It has no lock and no clock: the owner holds its own lock and passes the time.
    """

    def __init__(self, addresses: Callable[[], str], now_s: float) -> None:
        self._addresses = addresses
        self._live: set[Hashable] = set()
        self._since_s = now_s  # when the last worker was lost
        self._has_logged = False
        self._cause: SidelightError | None = None  # why the last call ended

    def __contains__(self, worker: Hashable) -> bool:
        return worker in self._live

    def __bool__(self) -> bool:
        return bool(self._live)

    def mark_live(self, worker: Hashable) -> None:
        """Record that a worker's server has accepted the call."""
        self._live.add(worker)
        self._has_logged = False

    def mark_gone(self, worker: Hashable, cause: SidelightError, now_s: float) -> None:
        if self._live == {worker}:
            self._since_s = now_s
        self._live.discard(worker)
        self._cause = cause

    def log_waiting(self, now_s: float) -> float | None:
        """Log once that no server is available for `WARN_AFTER_S`. Returns when to call again; None for never."""
        if self._live or self._has_logged:
            return None
        if now_s - self._since_s < WARN_AFTER_S:
            return self._since_s + WARN_AFTER_S
        self._has_logged = True
        log.warning("waiting for a server at %s", self._addresses())
        return None

    def deadline_s(self, server_wait_s: float) -> float | None:
        """Return the time at which to give up, after `server_wait_s` without any server; None while there is one."""
        return None if self._live else self._since_s + server_wait_s

    def error(self, what: str) -> SidelightError:
        """Return the error for having no server: `ResourceExhausted` if the last one accepts no more streams."""
        because = f" (the last call ended with: {self._cause})" if self._cause else ""
        if isinstance(self._cause, ResourceExhausted):
            return ResourceExhausted(f"{what} the server was full at {self._addresses()}{because}")
        return Unavailable(f"{what} no server answered at {self._addresses()}{because}")
