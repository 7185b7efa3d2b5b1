"""Serves the page with uvicorn, on a socket that is open before the URL is printed."""

import socket
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import uvicorn

from ..aio import AsyncClient
from .app import make_app
from .guard import LOOPBACK_NAMES

PROBE_TIMEOUT_S = 1.0  # for the line about the server, which must not wait as long as a call
SHUTDOWN_S = 2


def serve(
    paths: Sequence[Path],
    *,
    connect: Callable[..., AsyncClient],
    host: str,
    port: int,
    host_names: Collection[str],
    ready: Callable[[str], None],
) -> None:
    """Serve the page until SIGINT or SIGTERM. `ready` is called with its URL once connections are accepted.

    `connect` returns a client of the server. `OSError` if the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        hosts = {*(LOOPBACK_NAMES if is_loopback(host) else (host,)), *host_names}
        shown = f"[{host}]" if family is socket.AF_INET6 else host
        app = make_app(connect(), connect(connect_timeout=PROBE_TIMEOUT_S), paths, hosts=hosts)
        config = uvicorn.Config(
            app, access_log=False, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_S, ws="none"
        )
        ready(f"http://{shown}:{listener.getsockname()[1]}/")
        uvicorn.Server(config).run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is this machine's own."""
    return host in LOOPBACK_NAMES
