"""Counts the bytes that autograd saves in a forward pass, and stops the pass before memory runs out."""

import math
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from ..errors import ResourceExhausted


class TooLarge(ResourceExhausted):
    """A chunk does not fit into memory. `fitting` is the number of rows that do; 0: not even one."""

    def __init__(self, message: str, *, fitting: int = 0) -> None:
        super().__init__(message)
        self.fitting = fitting


class SavedMemory:
    """Context manager that counts the bytes that autograd saves on this thread, without the weights.

    Above `limit` bytes it raises `MemoryError` within the pass, and in every later pass in the block. The module may
    catch that error, so check `is_over`.
    """

    def __init__(self, *, limit: float = math.inf, weights: nn.Module | None = None) -> None:
        self._limit = limit
        held = (*weights.parameters(), *weights.buffers()) if weights is not None else ()
        self._weights = {_storage(each)[0] for each in held}
        self._kept: dict[int, int] = {}  # bytes of each storage, by its address
        self.n_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, _unpack)

    @property
    def is_over(self) -> bool:
        return self.n_bytes > self._limit

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._hooks.__exit__(kind, error, at)

    def _keep(self, tensor: Tensor) -> Tensor:
        address, n_bytes = _storage(tensor)
        if address not in self._weights:
            self.n_bytes += max(0, n_bytes - self._kept.get(address, 0))
            self._kept[address] = n_bytes
        if self.is_over:
            raise MemoryError(f"the pass keeps more than {self._limit} bytes")
        return tensor


def _storage(tensor: Tensor) -> tuple[int, int]:
    """Return an identifier of a tensor's memory, and its size in bytes."""
    if tensor.layout is not torch.strided:  # sparse: it has no storage of its own
        return id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
