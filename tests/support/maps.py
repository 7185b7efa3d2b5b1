"""Comparisons of maps with expected ones."""

import numpy as np

from support.tolerances import NEIGHBORS


def assert_same(maps: np.ndarray, expected: np.ndarray) -> None:
    assert maps.shape == expected.shape
    np.testing.assert_allclose(maps, expected, rtol=0, atol=NEIGHBORS * np.abs(expected).max(initial=0))
