"""The metrics endpoint: metrics over HTTP, each scrape on a thread of its own."""

import contextlib
import socket
import socketserver
import threading
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from ..errors import ConfigurationError
from .addresses import host_and_port, is_loopback

CALLER_S = 10.0  # that one who asks may pause, in the question and before the answer
N_CALLERS = 16  # who may ask at once, each on a thread; for one more, the one who has been there longest is cut off


class _Handler(MetricsHandler):
    timeout = CALLER_S
    server_version, sys_version = "sidelight", ""  # not Python's, for whoever looks for old ones


class MetricsServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Tells metrics over HTTP at an address, `http://host:port/metrics`. Closed, nothing of it is left.

    `ConfigurationError` where the address is none, or is not loopback and `plaintext` is not set; `OSError` where it
    cannot be had.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128  # of connections that are not taken yet; five by default

    def __init__(self, metrics: Collector, address: str, *, plaintext: bool) -> None:
        host, port = host_and_port(address, setting="metrics_listen")
        if not plaintext and not is_loopback(host):
            raise ConfigurationError(
                f"metrics_listen: {address} is not loopback, and nothing would be encrypted; "
                "say --plaintext if that is meant"
            )
        registry = CollectorRegistry()
        registry.register(metrics)
        ProcessCollector(registry=registry)
        handler = _Handler.factory(registry)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._is_closing = False
        self._lock = threading.Lock()
        self._callers: dict[socket.socket, None] = {}  # in the order in which they came
        try:
            super().__init__((host, port), handler)
        except OverflowError as error:
            raise ConfigurationError(f"metrics_listen: cannot bind {address}: {error}") from None
        self.address = f"{address.rpartition(':')[0]}:{self.server_address[1]}"
        self._thread = threading.Thread(target=self._run, name="sidelight-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._is_closing = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for callers
        self._thread.join(CALLER_S)
        self.server_close()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take who asks. Who is slow, or says nothing, cannot keep the others out."""
        with self._lock:
            if len(self._callers) >= N_CALLERS:
                longest = next(iter(self._callers))
                del self._callers[longest]
                with contextlib.suppress(OSError):
                    longest.shutdown(socket.SHUT_RDWR)  # its thread closes it
            self._callers[request] = None
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, on a thread of its own."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._callers.pop(request, None)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: who asked has gone, or asks too slowly."""

    def _run(self) -> None:
        while not self._is_closing:
            self.handle_request()
