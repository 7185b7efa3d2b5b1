"""Tolerances of tests, with reasons: shares of the largest value of the expected map. And the comparison of maps."""

import numpy as np

# docs/explanation/precision.md promises it: in float32 on the CPU, a map depends on the other rows in its chunk by this
# share at most, because matrix products of other sizes add in another order.
NEIGHBORS = 4e-6

# The same on a GPU, whose kernels are chosen by size and add in many more orders.
GPU = 1e-4

# Maps of a float64 model come back as float32, half a unit in the last place of which is 6e-8 of a value.
FLOAT32 = 1e-7

# A linear model's maps in float32 against the closed form in float64: its gradients are differences of near numbers.
CLOSED_FORM = {"rtol": 1e-4, "atol": 1e-8}


def assert_same(maps: np.ndarray, expected: np.ndarray) -> None:
    """Check that maps differ by no more than the neighbors in a chunk may change them."""
    assert maps.shape == expected.shape
    np.testing.assert_allclose(maps, expected, rtol=0, atol=NEIGHBORS * np.abs(expected).max(initial=0))
