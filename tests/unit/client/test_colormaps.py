"""Color maps: those that others know are theirs, magnitudes rise in lightness, and signs are told apart."""

import matplotlib as mpl
import numpy as np
import pytest
from sidelight.visualization.colormaps import NAMES, color_bar, find_colormap

SEQUENTIAL = ("heat", "viridis", "magma", "cividis")
DIVERGING = ("diverging", "coolwarm")
TOLERANCE = 8  # of 255: 33 anchors with straight lines between them


def luminance(colors: np.ndarray) -> np.ndarray:
    """Return CIE luminance of sRGB colors."""
    encoded = colors / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def bar(name: str, *, signed: bool = False) -> np.ndarray:
    return np.asarray(color_bar(511 if signed else 256, 1, signed=signed, colormap=name)).astype(int)[0]


def test_every_color_map_is_sequential_or_diverging() -> None:
    assert sorted(NAMES) == sorted(SEQUENTIAL + DIVERGING)
    assert [find_colormap(name, signed=False).is_diverging for name in SEQUENTIAL + DIVERGING] == [False] * 4 + [
        True
    ] * 2


@pytest.mark.parametrize("name", ["viridis", "magma", "cividis", "coolwarm"])
def test_a_color_map_of_matplotlibs_is_matplotlibs(name: str) -> None:
    signed = name in DIVERGING
    colors = bar(name, signed=signed)
    expected = mpl.colormaps[name](np.linspace(0, 1, len(colors)))[:, :3] * 255
    assert np.abs(colors - expected).max() <= TOLERANCE


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_color_map_rises_in_luminance_and_draws_magnitudes(name: str) -> None:
    assert (np.diff(luminance(bar(name)[::8])) > 0).all()
    both = bar(name, signed=True)
    np.testing.assert_array_equal(both, both[::-1])


@pytest.mark.parametrize("name", DIVERGING)
def test_a_diverging_color_map_tells_the_signs_apart(name: str) -> None:
    colors = bar(name, signed=True)
    below, above = colors[:255][::-1], colors[256:]
    assert (below[64:, 2] > below[64:, 0]).all()  # blue
    assert (above[64:, 0] > above[64:, 2]).all()  # red
    np.testing.assert_array_equal(bar(name), colors[255:])  # a map without negative values has the upper half


def test_unless_one_is_named_the_map_decides() -> None:
    assert find_colormap(None, signed=False) is find_colormap("heat", signed=True)
    assert find_colormap(None, signed=True) is find_colormap("diverging", signed=False)
