"""Weights: what a module holds, and the digest that names it."""

import hashlib

import torch
from torch import Tensor, nn


class Weights:
    """A module's parameters and buffers, and their digest together with the facts that a map depends on.

    The caller may go on to train the module. torch counts every write to a tensor, so it is known, at no cost, when the
    digest must be taken anew.
    """

    def __init__(self, module: nn.Module, *, facts: str) -> None:
        self._facts = facts
        state = sorted(module.state_dict().items(), key=lambda item: item[0])
        self._tensors = [(name, value) for name, value in state if isinstance(value, Tensor)]
        self._extra = [(name, repr(value)) for name, value in state if not isinstance(value, Tensor)]
        self._versions: list[int] | None = None
        self._digest = ""

    @property
    def digest(self) -> str:
        """The SHA-256 of names, types, shapes, bytes and facts, in hexadecimal."""
        versions = [0 if value.is_inference() else value._version for _, value in self._tensors]
        if versions != self._versions:
            self._digest, self._versions = self._computed(), versions
        return self._digest

    def _computed(self) -> str:
        digest = hashlib.sha256(f"{self._facts} {self._extra}".encode())
        for name, value in self._tensors:
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
