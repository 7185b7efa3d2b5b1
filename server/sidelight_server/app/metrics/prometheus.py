"""Prometheus metrics of one server: the counters of its requests, and gauges that are read at each scrape.

`app.metrics.metrics_http` serves them. Each server has a registry of its own; see `telemetry.counters`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from ...compute.host_memory import resident_bytes
from ...engine.devices.device import Device
from ...engine.engine import Engine
from ...security.reloadable_files import SecretFiles
from ...telemetry.counters import Counters
from ..health.health import MODEL, statuses
from .counts import ServerCounts


class Metrics(Collector):
    """Collects all metrics of one server."""

    def __init__(
        self,
        engine: Engine,
        counters: Counters,
        counts: Callable[[], ServerCounts],
        files: Sequence[SecretFiles[Any]] = (),
    ) -> None:
        self._engine = engine
        self._counters = counters
        self._counts = counts
        self._files = files

    def collect(self) -> Iterator[Metric]:
        self._counters.start_at_zero(list(self._engine.registry.entries))
        for family in self._counters.registry.collect():
            family.samples = _samples(family)
            yield family
        yield from self._work()
        yield from self._models()
        yield from self._devices()
        yield self._stale()

    def _work(self) -> Iterator[Metric]:
        devices, counts = self._engine.devices, self._counts()
        rows = HistogramMetricFamily("sidelight_chunk_rows", "rows that ran at once", labels=("device",))
        for name, device in _named(devices):
            for sample in itertools.chain.from_iterable(map(_samples, device.worker.chunk_rows.collect())):
                rows.add_sample(sample.name, {"device": name, **sample.labels}, sample.value)
        yield rows
        yield GaugeMetricFamily("sidelight_batches_in_flight", "batches that hold a permit", value=counts.permits)
        yield GaugeMetricFamily("sidelight_batches_waiting", "batches that wait for a permit", value=counts.waiting)
        yield GaugeMetricFamily(
            "sidelight_in_flight_bytes", "bytes of those batches and their answers", value=counts.permit_bytes
        )
        in_flight = GaugeMetricFamily(
            "sidelight_rows_in_flight", "upper bound of the rows of batches on a device", labels=("device",)
        )
        for name, device in _named(devices):
            in_flight.add_metric([name], device.n_rows)
        yield in_flight
        yield GaugeMetricFamily(
            "sidelight_backlog_seconds",
            "work that waits or runs: rows in flight / rows per second",
            value=self._engine.backlog_s,
        )
        yield GaugeMetricFamily("sidelight_streams_open", "open streams", value=counts.streams)
        yield CounterMetricFamily(
            "sidelight_shed_streams", "idle streams that were ended because memory was short", value=counts.shed_streams
        )
        yield CounterMetricFamily(
            "sidelight_stopped_batches",
            "batches that were cancelled while one of their rows ran",
            value=self._engine.cancellations.count,
        )

    def _models(self) -> Iterator[Metric]:
        entries = list(self._engine.registry.entries.values())
        info = GaugeMetricFamily("sidelight_model_info", "1 for the version that serves", labels=_INFO)
        serving = GaugeMetricFamily("sidelight_model_serving", "1 if the model serves, else 0", labels=("model",))
        failed = CounterMetricFamily("sidelight_model_load_failures", "loads that failed", labels=("model",))
        serves = statuses(self._engine, serves=True)  # the same as in health checks
        for entry in entries:
            if version := entry.models:
                info.add_metric([entry.name, str(version[0].version), version[0].digest, version[0].precision], 1)
            serving.add_metric([entry.name], int(serves.get(MODEL + entry.name, False)))
            failed.add_metric([entry.name], entry.n_failed)
        yield from (info, serving, failed)

    def _stale(self) -> Metric:
        stale = GaugeMetricFamily(
            "sidelight_secret_files_stale",
            "1 if changed files are invalid and the old content stays",
            labels=("files",),
        )
        # Each address has its own object for the same certificate files.
        for name, files in itertools.groupby(self._files, lambda each: each.name):
            stale.add_metric([name], int(any(each.is_stale for each in files)))
        return stale

    def _devices(self) -> Iterator[Metric]:
        memory = GaugeMetricFamily(
            "sidelight_device_memory_bytes",
            "bytes of memory that this process uses on a GPU; for a CPU, its resident memory",
            labels=("device",),
        )
        free = GaugeMetricFamily("sidelight_device_free_bytes", "free bytes of a GPU's memory", labels=("device",))
        moves = GaugeMetricFamily("sidelight_device_moves", "1 if a device makes progress, else 0", labels=("device",))
        short = CounterMetricFamily(
            "sidelight_out_of_memory", "chunks that did not fit into a device's memory", labels=("device",)
        )
        for name, device in _named(self._engine.devices):
            labels = [name]
            moves.add_metric(labels, int(device.is_responsive))
            short.add_metric(labels, device.worker.errors.n_out_of_memory)
            if device.torch_device.type == "cuda":
                memory.add_metric(labels, torch.cuda.memory_reserved(device.torch_device))
                free.add_metric(labels, torch.cuda.mem_get_info(device.torch_device)[0])
            else:
                memory.add_metric(labels, resident_bytes())
        yield from (memory, free, moves, short)


_INFO = ("model", "version", "digest", "precision")


def _samples(family: Metric) -> list[Sample]:
    """Return a family's samples without the creation times of its series."""
    return [each for each in family.samples if not each.name.endswith("_created")]


def _named(devices: Sequence[Device]) -> Iterator[tuple[str, Device]]:
    """Yield the devices with unique names."""
    seen: set[str] = set()
    for device in devices:
        name = str(device.torch_device)
        yield f"{name}#{device.index}" if name in seen else name, device
        seen.add(name)
