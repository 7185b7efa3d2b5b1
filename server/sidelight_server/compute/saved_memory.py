"""The bytes that autograd saves in a forward pass, counted as it runs, so that it ends before memory runs out."""

import math
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from ..errors import ResourceExhausted


class TooLarge(ResourceExhausted):
    """A chunk of more rows than there is memory for. `fitting` says how many there is memory for; 0: not for one."""

    def __init__(self, message: str, *, fitting: int = 0) -> None:
        super().__init__(message)
        self.fitting = fitting


class SavedMemory:
    """Counts what autograd keeps of the passes that run in its `with` block, in this thread, but for the weights.

    Once that is more than `limit` bytes, the pass ends with a `MemoryError`, and so does every other one in the block.
    What the module makes of that error is its own: `is_over` tells.
    """

    def __init__(self, *, limit: float = math.inf, weights: nn.Module | None = None) -> None:
        self._limit = limit
        held = (*weights.parameters(), *weights.buffers()) if weights is not None else ()
        self._weights = {_storage(each)[0] for each in held}
        self._kept: dict[int, int] = {}  # bytes of each storage, by its address
        self.n_bytes = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, _give_back)

    @property
    def is_over(self) -> bool:
        """Whether it was more than the limit."""
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
    """Return what tells a tensor's memory from others', and its bytes."""
    if tensor.layout is not torch.strided:  # it has no storage of its own
        return id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _give_back(tensor: Tensor) -> Tensor:
    return tensor
