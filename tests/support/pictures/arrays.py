"""Small pictures as arrays and as files, for the client's tests, and the comparison of their maps."""

import io

import numpy as np
from PIL import Image

# The contract: neighbors change a map by at most a millionth of its maximum. A pixel off by one changes it by more.
SHARE = 1e-6
PNG, JPEG, TIFF = "PNG", "JPEG", "TIFF"


def noise(height: int, width: int, channels: int = 3, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = PNG, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def assert_same(maps: np.ndarray, expected: np.ndarray) -> None:
    assert maps.shape == expected.shape
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, expected, rtol=0, atol=SHARE * expected.max(initial=0))
