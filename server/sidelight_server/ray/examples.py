"""Examples: turns the values of a Ray Data column into images for the engine."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sidelight._inputs.digests import digest_of_array, digest_of_file

from ..domain import Array, Files
from ..errors import InvalidArgument

Example = bytes | Array  # an encoded file; pixels [H, W, C] of uint8; or the model's own input [C, H, W] of floats

EXPECTED = "a path, the bytes of an image file, uint8 pixels [H, W, C] or floats [C, H, W]"


def example_of(value: object) -> Example:
    """Return a column's value as an example; a path is read. Raises `InvalidArgument`."""
    match value:
        case bytes():
            return value
        case str():
            try:
                return Path(value).read_bytes()
            except (OSError, ValueError) as error:  # ValueError: a path with a null byte
                raise InvalidArgument(f"{value}: {getattr(error, 'strerror', None) or error}") from None
        case np.ndarray() if value.ndim == 3 and value.size and value.dtype == np.uint8:
            return value
        case np.ndarray() if value.ndim == 3 and value.size and np.issubdtype(value.dtype, np.floating):
            return value
        case np.ndarray():
            raise InvalidArgument(f"got {value.dtype} of {list(value.shape)}, expected {EXPECTED}")
        case _:
            raise InvalidArgument(f"got {type(value).__name__}, expected {EXPECTED}")


def digest_of(example: Example) -> str:
    """Return the SHA-256 of an example, as in the provenance of an answer."""
    return digest_of_file(example) if isinstance(example, bytes) else digest_of_array(example)


def batches(examples: dict[int, Example]) -> list[tuple[list[int], Files | Array]]:
    """Return the rows and the images of each request: one for all files, one for the arrays of each shape and type."""
    kinds: dict[object, list[int]] = {}
    for row, example in examples.items():
        kind = None if isinstance(example, bytes) else (example.shape, example.dtype)
        kinds.setdefault(kind, []).append(row)
    return [(rows, _images([examples[row] for row in rows])) for rows in kinds.values()]


def _images(examples: Sequence[Example]) -> Files | Array:
    files = tuple(each for each in examples if isinstance(each, bytes))
    return Files(files) if files else np.stack([each for each in examples if not isinstance(each, bytes)])
