"""Weights: what a module holds, whether the caller has written to it since, and the digest that names it."""

import hashlib
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Seen:
    """A state of a module's tensors, as counts of the changes that were noticed before it."""

    replaced: int = 0  # a tensor gave way to another, or its memory did
    written: int = 0  # that, or its values changed


class Watch:
    """Notices when somebody replaces a module's parameters and buffers, or writes to them.

    torch counts the writes to each tensor, so a look costs no more than a walk through the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._lock = threading.Lock()
        # Held: a tensor that is gone could give its address to the next.
        self._tensors = _tensors(module)
        self._addresses = [address(each) for each in self._tensors]
        self._versions = [_version(each) for each in self._tensors]
        self._seen = Seen()

    def look(self) -> Seen:
        """Return the state that the tensors are in now."""
        with self._lock:
            tensors = _tensors(self.module)
            addresses = [address(each) for each in tensors]
            versions = [_version(each) for each in tensors]
            is_replaced = addresses != self._addresses or any(
                ours is not theirs for ours, theirs in zip(tensors, self._tensors, strict=True)
            )
            if is_replaced or versions != self._versions:
                self._tensors, self._addresses, self._versions = tensors, addresses, versions
                self._seen = Seen(self._seen.replaced + is_replaced, self._seen.written + 1)
            return self._seen


def address(tensor: Tensor) -> int:
    """Return where a tensor's values lie; of one that has no such place, 0."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, or of a class of its own
        return 0


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


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
