"""Arrival times of an open loop, in seconds from its start, independent of the server."""

import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np

Arrivals = Literal["constant", "poisson"]


def arrivals(kind: Arrivals, rate: float, *, seed: int = 0) -> Iterator[float]:
    """Yield the due times of requests without end, at `rate` per second: evenly spaced, or a Poisson process."""
    return _constant(rate) if kind == "constant" else _poisson(rate, seed)


def _constant(rate: float) -> Iterator[float]:
    return (i / rate for i in itertools.count())  # not a running sum: its rounding error would grow


def _poisson(rate: float, seed: int) -> Iterator[float]:
    random = np.random.default_rng(seed)
    due_s = 0.0
    while True:
        due_s += random.exponential(1 / rate)
        yield due_s
