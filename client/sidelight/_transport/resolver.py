"""The resolver: looks up the addresses of DNS names periodically, so that servers may be added and removed.

The name of a headless service in Kubernetes means the addresses of all its replicas.
"""

import logging
import random
import re
import socket
import threading
from collections.abc import Callable, Sequence

log = logging.getLogger("sidelight")

REFRESH_S = 2.0  # a new server is found within this time, once the name servers know it
# The most servers of one name that a client connects to: each stream has two threads for every server.
MAX_SERVERS = 32

_NAME = re.compile(r"dns:(?:///)?(?P<host>[^/]+):(?P<port>\d+)")


def parse_name(address: object) -> tuple[str, int] | None:
    """Return host and port of "dns:host:port" or "dns:///host:port"; None for another address."""
    match = _NAME.fullmatch(address) if isinstance(address, str) else None
    return (match["host"].strip("[]"), int(match["port"])) if match else None


class Resolver:
    """A thread that looks up names. It calls `on_found` with the addresses, each with its name, when they have changed.

    A name that cannot be looked up keeps its last addresses.
    """

    def __init__(self, names: Sequence[tuple[str, int]], on_found: Callable[[dict[str, str]], None]) -> None:
        self._found: dict[tuple[str, int], list[str]] = {name: [] for name in names}
        self._on_found = on_found
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sidelight-resolve", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. A running lookup is not waited for."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            for name in self._found:
                self._look_up(name)
            self._on_found({each: host for (host, _), addresses in self._found.items() for each in addresses})
            self._closed.wait(REFRESH_S * random.uniform(0.8, 1.0))  # jitter: clients should not all look up at once

    def _look_up(self, name: tuple[str, int]) -> None:
        try:
            answers = socket.getaddrinfo(*name, type=socket.SOCK_STREAM)
        except OSError as error:
            log.info("%s:%d: the lookup failed: %s", *name, error)
            return
        hosts = dict.fromkeys(str(address[0]) for *_, address in answers)
        found = [f"[{each}]:{name[1]}" if ":" in each else f"{each}:{name[1]}" for each in hosts]
        kept = [each for each in self._found[name] if each in found]
        added = [each for each in found if each not in kept]
        room = max(0, MAX_SERVERS - len(kept))
        self._found[name] = kept + (random.sample(added, room) if len(added) > room else added)
