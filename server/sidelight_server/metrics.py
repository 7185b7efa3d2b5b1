"""The metrics: the counts as Prometheus reads them, over HTTP, made on a thread of their own when they are asked for.

What is counted is counted elsewhere, as plain numbers; see `counts`. Each server has a registry of its own.
"""

import contextlib
import itertools
import socket
import socketserver
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import MetricsHandler
from prometheus_client.registry import Collector

from .addresses import host_and_port, is_loopback
from .counts import REASONS, SPANS, Counts
from .engine import Engine
from .errors import ConfigurationError
from .explainer import Explainer
from .health import MODEL, statuses
from .histogram import Histogram
from .memory import resident_bytes
from .secret_files import SecretFiles
from .service import AttributionService
from .station import Station
from .status import STATUSES

CALLER_S = 10.0  # that one who asks may pause, in the question and before the answer
N_CALLERS = 16  # who may ask at once, each on a thread; for one more, the one who has been there longest is cut off

_SPANS = {
    "admission": "from a batch's arrival until it was let in: for its model, a slot of its stream and the permits",
    "prepare": "decoding and resizing",
    "queue": "waiting for the device, until the first row ran",
    "compute": "from the first row's start to the last row's end",
    "total": "from a batch's arrival until its maps were there",
}


class Metrics(Collector):
    """What there is to tell of one server."""

    def __init__(
        self,
        engine: Engine,
        explainer: Explainer,
        service: AttributionService,
        files: Sequence[SecretFiles[Any]] = (),
    ) -> None:
        self._engine = engine
        self._files = files
        self._explainer = explainer
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics, as they are now."""
        counts = self._explainer.passages.counts
        yield from _batches(counts, list(self._engine.registry.entries))
        yield from _times(counts)
        yield from self._work()
        yield from self._models()
        yield from self._devices()
        yield self._stale()

    def _work(self) -> Iterator[Metric]:
        stations, admission = self._engine.stations, self._explainer.admission
        rows = _counted("sidelight_chunk_rows", "rows that ran at once", ("device",))
        for name, station in _named(stations):
            _add(rows, [name], station.runner.chunk_rows)
        yield rows
        yield _gauge("sidelight_batches_in_flight", "batches that hold a permit", admission.n_requests)
        yield _gauge("sidelight_in_flight_bytes", "bytes of those batches and their answers", admission.n_bytes)
        in_flight = GaugeMetricFamily(
            "sidelight_rows_in_flight", "rows that batches at a device may take at most", labels=("device",)
        )
        for name, station in _named(stations):
            in_flight.add_metric([name], station.n_rows)
        yield in_flight
        yield _gauge("sidelight_streams_open", "streams that are open", self._service.n_streams)
        stops = self._engine.stops
        yield CounterMetricFamily(
            "sidelight_stopped_batches", "batches that were cancelled while a row of theirs ran", value=stops.count
        )

    def _models(self) -> Iterator[Metric]:
        entries = list(self._engine.registry.entries.values())
        info = GaugeMetricFamily("sidelight_model_info", "1 for the version that serves", labels=_INFO)
        serving = GaugeMetricFamily("sidelight_model_serving", "1 where the model answers, else 0", labels=("model",))
        failed = CounterMetricFamily("sidelight_model_load_failures", "loads that failed", labels=("model",))
        serves = statuses(self._engine, serves=True)  # as health has it
        for entry in entries:
            if version := entry.models:
                info.add_metric([entry.name, str(version[0].version), version[0].digest, version[0].precision], 1)
            serving.add_metric([entry.name], int(serves.get(MODEL + entry.name, False)))
            failed.add_metric([entry.name], entry.n_failed)
        yield from (info, serving, failed)

    def _stale(self) -> Metric:
        stale = GaugeMetricFamily(
            "sidelight_secret_files_stale",
            "1 where changed files were not good and the old ones stay",
            labels=("files",),
        )
        # Each address has certificates of its own, from the same files.
        for name, files in itertools.groupby(self._files, lambda each: each.name):
            stale.add_metric([name], int(any(each.is_stale for each in files)))
        return stale

    def _devices(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily(
            "sidelight_device_memory_bytes",
            "bytes that this process holds of a GPU's memory; for a CPU, of the machine's",
            labels=("device",),
        )
        free = GaugeMetricFamily(
            "sidelight_device_free_bytes", "bytes of a GPU's memory that nobody holds", labels=("device",)
        )
        moves = GaugeMetricFamily(
            "sidelight_device_moves", "1 where a device makes progress, else 0", labels=("device",)
        )
        short = CounterMetricFamily(
            "sidelight_out_of_memory", "chunks that did not fit into a device's memory", labels=("device",)
        )
        for name, station in _named(self._engine.stations):
            labels = [name]
            moves.add_metric(labels, int(station.moves))
            short.add_metric(labels, station.runner.n_out_of_memory)
            if station.device.type == "cuda":
                memory.add_metric(labels, torch.cuda.memory_reserved(station.device))
                free.add_metric(labels, torch.cuda.mem_get_info(station.device)[0])
            else:
                memory.add_metric(labels, resident_bytes())
        yield from (memory, free, moves, short)


_INFO = ("model", "version", "digest", "precision")


def _batches(counts: Counts, models: list[str]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "sidelight_requests", "batches that were answered, by how", labels=("call", "model", "method", "code")
    )
    for (call, model, method, code), n in counts.requests.copy().items():
        requests.add_metric([call, model, method, STATUSES[code].name], n)
    yield requests
    # From zero on: of a counter that begins with its first failure, Prometheus sees no rise.
    failures = (
        dict.fromkeys(itertools.product(("batch", "example"), ("", *models), REASONS), 0) | counts.failures.copy()
    )
    yield _labelled("sidelight_failures", "what failed and why", ("of", "model", "reason"), failures.items())
    yield _labelled(
        "sidelight_answers", "answers by how images and maps travelled", ("transport",),
        (((transport,), n) for transport, n in counts.transports.copy().items()),
    )  # fmt: skip
    for name, told, counted in (
        ("sidelight_predictions_compared", "predictions whose served class was told", counts.compared),
        ("sidelight_prediction_mismatches", "those that were another class than was served", counts.differing),
    ):
        of_models = dict.fromkeys(models, 0) | counted.copy()
        yield _labelled(name, told, ("model",), (((model,), n) for model, n in of_models.items()))


def _times(counts: Counts) -> Iterator[Metric]:
    of_models = counts.spans.copy()
    for name in SPANS:
        family = _counted(f"sidelight_{name}_seconds", _SPANS[name], ("model",))
        for model, histograms in of_models.items():
            _add(family, [model], histograms[name])
        yield family


def _named(stations: Sequence[Station]) -> Iterator[tuple[str, Station]]:
    """Yield the devices with their names, of which there may be one twice."""
    seen: set[str] = set()
    for station in stations:
        name = str(station.device)
        yield f"{name}#{station.index}" if name in seen else name, station
        seen.add(name)


def _gauge(name: str, told: str, value: float) -> Metric:
    return GaugeMetricFamily(name, told, value=value)


def _labelled(
    name: str, told: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], int]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, told, labels=labels)
    for each, n in values:
        family.add_metric(each, n)
    return family


def _counted(name: str, told: str, labels: tuple[str, ...]) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, told, labels=labels)


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    sums = list(itertools.accumulate(histogram.counts.copy()))
    bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
    family.add_metric(labels, list(zip(bounds, sums, strict=True)), sum_value=histogram.total)


class _Handler(MetricsHandler):
    timeout = CALLER_S
    server_version, sys_version = "sidelight", ""  # not Python's, for whoever looks for old ones


class Exposition(socketserver.ThreadingMixIn, socketserver.TCPServer):
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
