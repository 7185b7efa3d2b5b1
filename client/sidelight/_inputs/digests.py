"""SHA-256 digests of examples. The server records them in provenance, and a replay checks them."""

import functools
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest_of_file(file: bytes) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(file).hexdigest()


def digest_of_array(example: NDArray[Any], *, dtype: str | None = None) -> str:
    """Return the SHA-256 of one example's type, shape and elements, in hexadecimal.

    The hashed bytes are the text "float32 [3, 224, 224]", a line feed, and the elements, little-endian and contiguous.
    `dtype` overrides the type's name: "bfloat16" for its bits in a uint16 array.
    """
    elements = np.ascontiguousarray(example.astype(example.dtype.newbyteorder("<"), copy=False))
    digest = hashlib.sha256(_header(dtype or example.dtype.name, example.shape))
    digest.update(elements.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{dtype} {list(shape)}\n".encode()
