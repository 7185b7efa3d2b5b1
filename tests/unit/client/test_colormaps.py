"""Color maps: known ones equal matplotlib's, luminance rises with magnitude, and signs can be distinguished.

Both also in gray print and for color-blind readers.
"""

import matplotlib as mpl
import numpy as np
import pytest
from sidelight.visualization.colormaps import NAMES, color_bar, find_colormap

SEQUENTIAL = ("heat", "viridis", "magma", "cividis")
DIVERGING = ("diverging", "blue_gold", "coolwarm")
TOLERANCE = 8  # of 255: 33 anchors with straight lines between them
STEP = 8  # of 256 colors: the smallest that 8 bits do not round away

# Linear sRGB as seen without one kind of cone: Machado, Oliveira and Fernandes, 2009, "A Physiologically-based Model
# for Simulation of Color Vision Deficiency", severity 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
every_vision = pytest.mark.parametrize("vision", VISION)
# sRGB to CIE XYZ, relative to the white point D65
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = TO_XYZ.sum(axis=1)


def seen(colors: np.ndarray, vision: str = "normal") -> np.ndarray:
    """Return sRGB colors [n, 3] as linear ones, as a person sees them."""
    encoded = colors / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.clip(linear @ VISION[vision].T, 0, 1)


def luminance(colors: np.ndarray, vision: str = "normal") -> np.ndarray:
    """Return CIE luminance: what a gray print shows."""
    return seen(colors, vision) @ TO_XYZ[1]


def lab(colors: np.ndarray, vision: str) -> np.ndarray:
    """Return CIE L*a*b*, in which about 2.3 is just noticeable."""
    ratio = seen(colors, vision) @ TO_XYZ.T / WHITE
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def bar(name: str, *, signed: bool = False) -> np.ndarray:
    return np.asarray(color_bar(511 if signed else 256, 1, signed=signed, colormap=name)).astype(int)[0]


def test_every_color_map_is_sequential_or_diverging() -> None:
    assert sorted(NAMES) == sorted(SEQUENTIAL + DIVERGING)
    assert [find_colormap(name, signed=False).is_diverging for name in SEQUENTIAL + DIVERGING] == [False] * 4 + [
        True
    ] * 3


@pytest.mark.parametrize("name", ["viridis", "magma", "cividis", "coolwarm"])
def test_a_matplotlib_color_map_has_its_colors(name: str) -> None:
    signed = name in DIVERGING
    colors = bar(name, signed=signed)
    expected = mpl.colormaps[name](np.linspace(0, 1, len(colors)))[:, :3] * 255
    assert np.abs(colors - expected).max() <= TOLERANCE


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_color_map_draws_magnitudes(name: str) -> None:
    both = bar(name, signed=True)
    np.testing.assert_array_equal(both, both[::-1])


@every_vision
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_color_map_rises_in_luminance(name: str, vision: str) -> None:
    assert (np.diff(luminance(bar(name)[::STEP], vision)) > 0).all()


@every_vision
def test_blue_gold_rises_in_luminance_from_one_end_to_the_other(vision: str) -> None:
    assert (np.diff(luminance(bar("blue_gold", signed=True)[::STEP], vision)) > 0).all()


@every_vision
@pytest.mark.parametrize("name", DIVERGING)
def test_the_signs_of_a_diverging_color_map_are_distinguished(name: str, vision: str) -> None:
    """From a quarter of full scale on, by five times what is just noticeable."""
    colors = lab(bar(name, signed=True), vision)
    below, above = colors[:255][::-1], colors[256:]
    assert np.linalg.norm(below - above, axis=1)[64:].min() > 5 * 2.3


@pytest.mark.parametrize("name", DIVERGING)
def test_a_diverging_color_map_distinguishes_signs(name: str) -> None:
    colors = bar(name, signed=True)
    below, above = colors[:255][::-1], colors[256:]
    assert (below[64:, 2] > below[64:, 0]).all()  # blue
    assert (above[64:, 0] > above[64:, 2]).all()  # red
    np.testing.assert_array_equal(bar(name), colors[255:])  # a map without negative values has the upper half


def test_without_a_named_color_map_the_map_decides() -> None:
    assert find_colormap(None, signed=False) is find_colormap("heat", signed=True)
    assert find_colormap(None, signed=True) is find_colormap("diverging", signed=False)
