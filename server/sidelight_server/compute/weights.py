"""Weights: what a module holds, whether the caller has written to it since, and the digest that names it."""

import hashlib
import threading
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Seen:
    """A state of a module's tensors, as counts of the changes that were noticed before it."""

    replaced: int = 0  # a tensor gave way to another, or its memory did
    written: int = 0  # that, or its values changed


class Watch:
    """Notices when somebody replaces a module's parameters and buffers, or writes to them.

    torch counts the writes to each tensor, so a look costs no more than a walk through the module. It does not count
    those through `.data`: of a module that is shared, which others hold too, a look can compare a sum over all bytes as
    well, which takes 2 ms for 48 MB, of tensors in the host's memory alone. A module that is not shared is looked at by
    the tensors that it had: a source may give the same module again, with the next version's weights assigned to it.
    """

    def __init__(self, module: nn.Module, *, is_shared: bool = False) -> None:
        self.module = module
        self._is_shared = is_shared
        self._lock = threading.Lock()
        # Held: a tensor that is gone could give its address to the next.
        self._tensors = tensors_of(module)
        self._addresses = [address(each) for each in self._tensors]
        self._versions = [_version(each) for each in self._tensors]
        self._words = _words(self._tensors) if is_shared else []
        self._sums = _sums(self._words)
        self._seen = Seen()

    def look(self, *, at_values: bool = False) -> Seen:
        """Return the state that the tensors are in now; with their values read, where they are to be."""
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
                self._seen = Seen(self._seen.replaced + is_replaced, self._seen.written + 1)
            return self._seen


def _words(tensors: list[Tensor]) -> list[NDArray[np.uint64] | NDArray[np.uint8]]:
    """Return all bytes of tensors in the host's memory, as views: eight at a time, and what is left over."""
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
    """Return where a tensor's values lie; of one that has no such place, 0."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or of a class of its own
        return 0


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True, slots=True)
class Identity:
    """What computed an answer. Both are empty where the weights were written to meanwhile: it was no one thing then."""

    digest: str = ""  # SHA-256 of weights, preprocessing, outputs and labels
    canary: str = ""  # of what the model makes of a fixed input; see `Model.identify`


class Weights:
    """The digest of a module's parameters and buffers, together with the facts that a map depends on.

    The caller may go on to train the module: the digest is taken anew when the watch has noticed something.
    """

    def __init__(self, watch: Watch, *, facts: str) -> None:
        self._facts = facts
        self._watch = watch
        self._seen: Seen | None = None
        self._digest = ""

    @property
    def digest(self) -> str:
        """The SHA-256 of names, types, shapes, bytes and facts, in hexadecimal."""
        seen = self._watch.look()
        if seen != self._seen:
            self._digest, self._seen = self._computed(), seen
        return self._digest

    def _computed(self) -> str:
        state = sorted(self._watch.module.state_dict().items(), key=lambda item: item[0])
        extra = [(name, repr(value)) for name, value in state if not isinstance(value, Tensor)]
        digest = hashlib.sha256(f"{self._facts} {extra}".encode())
        for name, value in state:
            if isinstance(value, Tensor):
                digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
