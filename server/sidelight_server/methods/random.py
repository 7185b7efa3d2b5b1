"""Random numbers that depend only on the request's seed and the point.

Every example of a batch gets the same numbers, so a map does not depend on its batch.
"""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, *point: object, device: torch.device) -> torch.Generator:
    """Return a generator seeded by the request's seed and the point."""
    # Hashed, because torch's CPU generator uses 32 bits of a seed, and similar seeds give similar first numbers.
    words = hashlib.blake2b(repr((seed, *point)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(words, "little"))


def noise(like: Tensor, seed: int, *point: object) -> Tensor:
    """Return standard normal noise of a tensor's shape, type and device."""
    chosen = generator(seed, *point, device=like.device)
    return torch.randn(like.shape, generator=chosen, dtype=like.dtype, device=like.device)


def uniform(seed: int, *point: object) -> float:
    """Return a number in [0, 1)."""
    return float(torch.rand((), generator=generator(seed, *point, device=torch.device("cpu")), dtype=torch.float64))


def integer(limit: int, seed: int, *point: object) -> int:
    """Return an integer in [0, limit)."""
    return int(torch.randint(limit, (), generator=generator(seed, *point, device=torch.device("cpu"))))
