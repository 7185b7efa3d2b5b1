"""Digests of examples: what an answer is bound to. The server puts them into provenance, and a replay looks at them."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest_of_file(file: bytes) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(file).hexdigest()


def digest_of_array(example: NDArray[Any], *, dtype: str | None = None) -> str:
    """Return the SHA-256 of one example of an array, in hexadecimal: of its type, its shape and its elements.

    What is hashed is the text "float32 [3, 224, 224]" and a line feed, then the elements, little-endian and without
    gaps. `dtype` is the type's name where that is not numpy's: "bfloat16" for its bits in uint16.
    """
    elements = np.ascontiguousarray(example.astype(example.dtype.newbyteorder("<"), copy=False))
    digest = hashlib.sha256(f"{dtype or example.dtype.name} {list(example.shape)}\n".encode())
    digest.update(elements.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
