"""Weights: detects changes to a module's parameters and buffers, and computes their digest."""

import hashlib
import threading
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Changes:
    """The number of detected changes of a module's tensors."""

    replaced: int = 0  # a tensor or its memory was replaced
    written: int = 0  # a tensor was replaced or its values were written to


class ChangeDetector:
    """Detects that a module's parameters or buffers were replaced or written to.

    It compares torch's version counters of the tensors, which is as cheap as iterating over the module. These do not
    count writes through `.data`, so for a shared module, which the caller still holds, `check` can also compare a sum
    over all bytes of tensors in host memory (2 ms for 48 MB). For a module that is not shared only the original tensors
    are compared: a source may return the same module again, with the next version's weights assigned to it.
    """

    def __init__(self, module: nn.Module, *, is_shared: bool = False) -> None:
        self.module = module
        self._is_shared = is_shared
        self._lock = threading.Lock()
        # Kept alive, because the address of a freed tensor could be reused.
        self._tensors = tensors_of(module)
        self._addresses = [address(each) for each in self._tensors]
        self._versions = [_version(each) for each in self._tensors]
        self._words = _words(self._tensors) if is_shared else []
        self._sums = _sums(self._words)
        self._seen = Changes()

    def check(self, *, at_values: bool = False) -> Changes:
        """Return the changes so far. With `at_values` the values of a shared module are compared too."""
        with self._lock:
            tensors = tensors_of(self.module) if self._is_shared else self._tensors
            addresses = [address(each) for each in tensors]
            versions = [_version(each) for each in tensors]
            is_replaced = addresses != self._addresses or any(
                ours is not theirs for ours, theirs in zip(tensors, self._tensors, strict=True)
            )
            if is_replaced and self._is_shared:
                self._words = _words(tensors)
            is_written = is_replaced or versions != self._versions
            if self._is_shared and (at_values or is_written):
                sums = _sums(self._words)
                is_written |= sums != self._sums
                self._sums = sums
            if is_written:
                self._tensors, self._addresses, self._versions = tensors, addresses, versions
                self._seen = Changes(self._seen.replaced + is_replaced, self._seen.written + 1)
            return self._seen


def _words(tensors: list[Tensor]) -> list[NDArray[np.uint64] | NDArray[np.uint8]]:
    """Return the bytes of all tensors in host memory as views: as 64-bit words, and the remaining bytes."""
    words: list[NDArray[np.uint64] | NDArray[np.uint8]] = []
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.layout == torch.strided and address(tensor):
            stored = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
            whole = len(stored) // 8 * 8
            words += [stored[:whole].view(np.uint64), stored[whole:]]
    return words


def _sums(words: list[NDArray[np.uint64] | NDArray[np.uint8]]) -> list[int]:
    return [int(np.add.reduce(each, dtype=np.uint64)) for each in words]


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's values; 0 if it has none."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or a tensor subclass
        return 0


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, slots=True)
class Identity:
    """The model that computed an answer. Both fields are empty if the weights changed during the computation."""

    digest: str = ""  # SHA-256 of weights, preprocessing, outputs and labels
    canary: str = ""  # digest of the model's output for a fixed input; see `ModelIdentity.identify`


def digest_of(module: nn.Module, *, facts: str) -> str:
    """Return the SHA-256 of a module's parameters and buffers, and of other facts, in hexadecimal.

    It covers their names, types, shapes and bytes, and the other state of the module.
    """
    state = sorted(module.state_dict().items(), key=lambda item: item[0])
    extra = [(name, repr(value)) for name, value in state if not isinstance(value, Tensor)]
    digest = hashlib.sha256(f"{facts} {extra}".encode())
    for name, value in state:
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
