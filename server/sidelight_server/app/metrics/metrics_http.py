"""The metrics endpoint: metrics over HTTP, each scrape on a thread of its own."""

import contextlib
import socket
import socketserver
import threading
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from ...errors import ConfigurationError
from ..addresses import host_and_port, is_loopback

CALLER_S = 10.0  # socket timeout of a connection
N_CALLERS = 16  # open connections, each with a thread; above it the oldest is closed


class _Handler(MetricsHandler):
    timeout = CALLER_S
    server_version, sys_version = "sidelight", ""  # does not reveal the version of Python


class MetricsServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves metrics over HTTP at `http://host:port/metrics`, on a thread that it starts.

    Raises `ConfigurationError` if the address is invalid, or is not loopback without `plaintext`, and `OSError` if it
    cannot be bound.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128  # backlog of connections that are not accepted yet; five by default

    def __init__(self, metrics: Collector, address: str, *, plaintext: bool) -> None:
        host, port = host_and_port(address, setting="metrics_listen")
        if not plaintext and not is_loopback(host):
            raise ConfigurationError(
                f"metrics_listen: {address} is not loopback, and nothing would be encrypted; allow it with --plaintext"
            )
        registry = CollectorRegistry()
        registry.register(metrics)
        ProcessCollector(registry=registry)
        handler = _Handler.factory(registry)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._is_closing = False
        self._lock = threading.Lock()
        self._callers: dict[socket.socket, None] = {}  # open connections, oldest first
        try:
            super().__init__((host, port), handler)
        except OverflowError as error:
            raise ConfigurationError(f"metrics_listen: cannot bind {address}: {error}") from None
        self.address = f"{address.rpartition(':')[0]}:{self.server_address[1]}"
        self._thread = threading.Thread(target=self._run, name="sidelight-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the socket and join the thread."""
        self._is_closing = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts connections
        self._thread.join(CALLER_S)
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Accept a connection. Above 16 open connections the oldest is closed."""
        with self._lock:
            if len(self._callers) >= N_CALLERS:
                longest = next(iter(self._callers))
                del self._callers[longest]
                with contextlib.suppress(OSError):
                    longest.shutdown(socket.SHUT_RDWR)  # its own thread closes the socket
            self._callers[request] = None
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._callers.pop(request, None)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors: the client disconnected or timed out."""

    def _run(self) -> None:
        while not self._is_closing:
            self.handle_request()
