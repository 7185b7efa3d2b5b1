"""Statistics of windows, and the test whether they agree. All durations are in seconds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .recorder import Fault, Sample, Window

STABLE_WINDOWS = 3  # that must agree, as in Triton's perf_analyzer
PERCENTILES = (50, 90, 95, 99)
PARTS = ("late", "transport", "prepare", "queue", "compute", "other")  # of a `Split`
BINS_PER_DECADE = 50


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of answers, from the due time of the request. Percentiles are nearest-rank."""

    mean_s: float
    p50_s: float
    p90_s: float
    p95_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class Split:
    """The mean latency by stage. The parts add up to it."""

    late_s: float  # from the due time until the request was sent
    transport_s: float  # client-side latency minus the server's time: network and client
    prepare_s: float
    queue_s: float
    compute_s: float
    other_s: float  # the rest of the server's time, from arrival to answer


@dataclass(frozen=True, slots=True)
class Lateness:
    """How late an open loop sent its requests."""

    sent: int
    late: int  # sent over 10 ms after the due time
    mean_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """A histogram of latency: `counts[i]` answers took from `edges_s[i]` to `edges_s[i + 1]`."""

    edges_s: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """The results of one window, or of several combined."""

    seconds: float
    requests: int  # answered ones
    requests_per_s: float
    images_per_s: float
    rows_per_s: float
    failed: int
    failures: dict[str, Fault]  # by the error's type
    client_cpu: float  # CPU time of this process per second
    latency: Latency | None  # None without an answer
    split: Split | None
    lateness: Lateness | None  # None in a closed loop

    @classmethod
    def of(cls, windows: Sequence[Window]) -> Self:
        seconds = math.fsum(each.ended_s - each.began_s for each in windows)
        requests = sum(each.latency.count for each in windows)
        failures = _failures(windows)
        return cls(
            seconds=seconds,
            requests=requests,
            requests_per_s=requests / seconds,
            images_per_s=sum(each.n_images for each in windows) / seconds,
            rows_per_s=sum(each.n_rows for each in windows) / seconds,
            failed=sum(each.count for each in failures.values()),
            failures=failures,
            client_cpu=sum(each.cpu_s for each in windows) / seconds,
            latency=_latency(windows) if requests else None,
            split=_split(windows, requests) if requests else None,
            lateness=_lateness(windows),
        )


def is_stable(windows: Sequence[Figures], *, within: float, percent: int) -> bool:
    """Return whether the last three windows agree in rate and in the latency percentile.

    They agree if the largest exceeds the smallest by at most the share `within`: 0.1 for 10 %. Windows without an
    answer never agree.
    """
    last = windows[-STABLE_WINDOWS:]
    if len(last) < STABLE_WINDOWS or not all(each.requests for each in last):
        return False
    rates = [each.requests_per_s for each in last]
    latencies = [getattr(each.latency, f"p{percent}_s") for each in last]
    return all(max(each) <= (1 + within) * min(each) for each in (rates, latencies))


def histogram(values: NDArray[np.float64]) -> Histogram:
    """Return a histogram with logarithmic bins, 50 per factor of ten."""
    if not len(values):
        return Histogram((), ())
    places = np.log10(np.maximum(values, 1e-9)) * BINS_PER_DECADE
    first, last = math.floor(places.min()), math.floor(places.max())
    counts = np.bincount(np.floor(places).astype(int) - first, minlength=last - first + 1)
    edges_s = tuple(10 ** (i / BINS_PER_DECADE) for i in range(first, last + 2))
    return Histogram(edges_s, tuple(map(int, counts)))


def joined(samples: Iterable[Sample]) -> NDArray[np.float64]:
    """Concatenate the numbers of several samples."""
    return np.concatenate([np.empty(0), *(each.values for each in samples)])


def percentile(values: NDArray[np.float64], percent: float) -> float:
    """Return a percentile by the nearest-rank method: always one of the values, without interpolation."""
    return float(np.percentile(values, percent, method="inverted_cdf"))


def _latency(windows: Sequence[Window]) -> Latency:
    samples = [each.latency for each in windows]
    values = joined(samples)
    mean_s = math.fsum(each.sum for each in samples) / sum(each.count for each in samples)
    p50_s, p90_s, p95_s, p99_s = (percentile(values, each) for each in PERCENTILES)
    return Latency(mean_s, p50_s, p90_s, p95_s, p99_s, max(each.max for each in samples))


def _split(windows: Sequence[Window], requests: int) -> Split:
    latency_s = math.fsum(each.latency.sum for each in windows) / requests
    late_s, prepare_s, queue_s, compute_s, server_s = (
        math.fsum(getattr(each, name) for each in windows) / requests
        for name in ("late_s", "prepare_s", "queue_s", "compute_s", "server_s")
    )
    return Split(
        late_s=late_s,
        transport_s=latency_s - late_s - server_s,
        prepare_s=prepare_s,
        queue_s=queue_s,
        compute_s=compute_s,
        other_s=server_s - prepare_s - queue_s - compute_s,
    )


def _lateness(windows: Sequence[Window]) -> Lateness | None:
    samples = [each.lateness for each in windows]
    sent = sum(each.count for each in samples)
    if not sent:
        return None
    mean_s, max_s = math.fsum(each.sum for each in samples) / sent, max(each.max for each in samples)
    late = sum(each.n_late for each in windows)
    return Lateness(sent, late, mean_s, percentile(joined(samples), 99), max_s)


def _failures(windows: Sequence[Window]) -> dict[str, Fault]:
    failures: dict[str, Fault] = {}
    for window in windows:
        for name, fault in window.faults.items():
            failures.setdefault(name, Fault(0, fault.message)).count += fault.count
    return failures
