"""A bounded random sample of a series of numbers, with its exact count, sum and maximum."""

import random
from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

MAX_VALUES = 1_000_000  # 8 MB


class Sample:
    """A sample of at most `limit` numbers, uniform over all that were added: Vitter, 1985, algorithm R."""

    def __init__(self, *, limit: int = MAX_VALUES, seed: int = 0) -> None:
        self.count = 0
        self.sum = 0.0
        self.max = 0.0
        self._limit = limit
        self._random = random.Random(seed)
        self._values = array("d")

    def add(self, value: float) -> None:
        self.count += 1
        self.sum += value
        self.max = max(self.max, value)
        if len(self._values) < self._limit:
            self._values.append(value)
        elif (index := self._random.randrange(self.count)) < self._limit:
            self._values[index] = value

    @property
    def values(self) -> NDArray[np.float64]:
        return np.array(self._values, np.float64)


def joined(samples: Iterable[Sample]) -> NDArray[np.float64]:
    """Concatenate the numbers of several samples."""
    return np.concatenate([np.empty(0), *(each.values for each in samples)])


def percentile(values: NDArray[np.float64], percent: float) -> float:
    """Return a percentile by the nearest-rank method: always one of the values, without interpolation."""
    return float(np.percentile(values, percent, method="inverted_cdf"))
