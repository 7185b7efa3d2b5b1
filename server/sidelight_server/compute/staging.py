"""Staging: copies examples to the device and maps back.

The rows of a chunk are copied once, out of the messages that brought them, into memory that is pinned where the device
is a GPU, so that the copy to the device need not block. Pixels travel as bytes and are normalised over there;
maps are reduced over there: only small things cross the bus. On a GPU each direction has a stream of its own: a copy
waits for what it needs, and hides behind the chunk that computes meanwhile.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..domain import Array

_TYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


class _Pinned:
    """Host memory that a GPU copies from or to without blocking: it grows, and is used again for every chunk."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        # torch's own annotations leave events out.
        self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def view(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the memory as a tensor, once the copy before has ended."""
        self._used.synchronize()
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes > self._bytes.numel():
            self._bytes = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        return self._bytes[:n_bytes].view(dtype).view(*shape)

    def is_used(self) -> None:
        """Say that a copy has just been asked for."""
        self._used.record()


class Arriving:
    """A tensor on its way to the host, by a stream of a GPU's."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        if stream is None:
            self._host = tensor.cpu()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        # As above.
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
            self._arrived.record()
        tensor.record_stream(stream)  # its memory is not given away before it was copied

    def wait(self) -> Tensor:
        """Return it on the host. Work that was given to the device later is not waited for."""
        if self._host.is_pinned():
            self._arrived.synchronize()
        return self._host


class Staging:
    """The way to one device and back. Used by the thread that owns the device alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._there = _Pinned() if device.type == "cuda" else None
        self._up, self._down = (_stream(device) for _ in range(2))

    def to_device(self, examples: Sequence[Array], *, dtype: np.dtype[np.generic]) -> Tensor:
        """Copy examples of one shape, [...], to the device as [n, ...], converted to `dtype` on the way."""
        shape = (len(examples), *examples[0].shape)
        host = self._there.view(shape, _TYPES[dtype]) if self._there else torch.empty(shape, dtype=_TYPES[dtype])
        array = host.numpy()
        for row, example in enumerate(examples):
            np.copyto(array[row], example, casting="same_kind")
        if self._there is None or self._up is None:
            return host.to(self._device)
        with torch.cuda.stream(self._up):
            there = host.to(self._device, non_blocking=True)
            self._there.is_used()
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._up)
        there.record_stream(computing)
        return there

    def leave(self, tensor: Tensor) -> Arriving:
        """Begin to copy a tensor to the host, once it has been computed."""
        return Arriving(tensor.detach(), self._down)

    def to_host(self, tensor: Tensor) -> Array:
        """Copy a tensor to the host, and wait for it."""
        array: Array = self.leave(tensor).wait().numpy()
        return array


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    # As above.
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def is_finite(array: Array) -> bool:
    """Say whether every element is finite."""
    return bool(np.isfinite(array).all())


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the model's input, [n, C, H, W], of pixels, uint8 [n, H, W, C]; mean and std, [C, 1, 1], are in pixels.

    The layout is made contiguous: channels-last strides would pick other convolution kernels, and other last bits.
    """
    permuted = pixels.permute(0, 3, 1, 2)  # [n, C, H, W]
    inputs = torch.empty(permuted.shape, dtype=mean.dtype, device=pixels.device)
    return torch.sub(permuted, mean, out=inputs).div_(std)
