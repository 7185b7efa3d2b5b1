"""Random numbers that depend on a request's seed and the point alone.

Every example of a batch gets the same draws, so neither neighbors nor position changes a map.
"""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, *point: object, device: torch.device) -> torch.Generator:
    """Return the generator of one point."""
    # On the CPU torch takes 32 bits of a seed, and near seeds begin alike: so the words are hashed.
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
    """Return one of 0 … limit − 1."""
    return int(torch.randint(limit, (), generator=generator(seed, *point, device=torch.device("cpu"))))
