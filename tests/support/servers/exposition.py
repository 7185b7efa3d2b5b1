"""Metrics of a server, as Prometheus reads them."""

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from sidelight_server.app import embedded
from sidelight_server.app.metrics.metrics_http import MetricsServer
from sidelight_server.app.metrics.prometheus import Metrics
from sidelight_server.app.server import Server

from support.servers.running import TIMEOUT_S, Running

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Samples:
    """The samples of a scrape, by name and labels."""

    def __init__(self, text: str) -> None:
        self.names: set[str] = set()
        self._values: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._values.setdefault(sample.name, []).append((sample.labels, sample.value))
                self.names.add(sample.name)

    def sum(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have these labels, and perhaps others."""
        return sum(value for each, value in self._values.get(name, ()) if labels.items() <= each.items())

    def labels(self, name: str) -> list[dict[str, str]]:
        return [labels for labels, _ in self._values[name]]


def scrape(address: str) -> Samples:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_S) as answer:
        return Samples(answer.read().decode())


@contextlib.contextmanager
def exposed(server: Running) -> Iterator[str]:
    """Serve the metrics of a running server; return the address."""
    metrics = Metrics(server.engine, server.server.handler.telemetry.counters, server.counts)
    exposition = MetricsServer(metrics, "127.0.0.1:0", plaintext=False)
    try:
        yield exposition.address
    finally:
        exposition.close()


def scrape_of(server: Running) -> Samples:
    server.until_all_permits_are_back()
    with exposed(server) as address:
        return scrape(address)


@contextlib.contextmanager
def in_thread(server: Server) -> Iterator[None]:
    with embedded._Thread(server, drain_s=5):
        yield
