"""Availability: which servers have a call of a stream now, and for how long there has been none."""

import logging
from collections.abc import Hashable, Sequence

from ..exceptions import ResourceExhausted, SidelightError, Unavailable

log = logging.getLogger("sidelight")

SILENT_WAIT_S = 1.0


class Availability:
    """The workers of a stream that are live. It has no clock and no lock: whoever holds it has both."""

    def __init__(self, addresses: Sequence[str], now_s: float) -> None:
        self._names = ", ".join(addresses)
        self._live: set[Hashable] = set()
        self._since_s = now_s  # since when there is none
        self._has_logged = False
        self._cause: SidelightError | None = None  # of the last call's end

    def __contains__(self, worker: Hashable) -> bool:
        return worker in self._live

    def __bool__(self) -> bool:
        return bool(self._live)

    def mark_live(self, worker: Hashable) -> None:
        """Count a worker whose server has taken the call."""
        self._live.add(worker)
        self._has_logged = False

    def mark_gone(self, worker: Hashable, cause: SidelightError, now_s: float) -> None:
        """Count it no more."""
        if self._live == {worker}:
            self._since_s = now_s
        self._live.discard(worker)
        self._cause = cause

    def log_waiting(self, now_s: float) -> float | None:
        """Say in the log, once, that there has been no server for a while. Returns when to ask again, if ever."""
        if self._live or self._has_logged:
            return None
        if now_s - self._since_s < SILENT_WAIT_S:
            return self._since_s + SILENT_WAIT_S
        self._has_logged = True
        log.warning("waiting for a server at %s", self._names)
        return None

    def gives_up_s(self, patience_s: float) -> float | None:
        """Return when there will have been none for so long; None while there is one."""
        return None if self._live else self._since_s + patience_s

    def error(self, what: str) -> SidelightError:
        """Return what to say of it: `Unavailable`, or `ResourceExhausted` where the server took no more streams."""
        because = f" (the last call ended with: {self._cause})" if self._cause else ""
        if isinstance(self._cause, ResourceExhausted):
            return ResourceExhausted(f"{what} the server was full at {self._names}{because}")
        return Unavailable(f"{what} no server answered at {self._names}{because}")
