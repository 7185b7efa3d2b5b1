"""Staging: copies examples to the device and maps back.

The examples of a chunk are copied once, from their messages into one buffer; for a GPU it is pinned, so that the copy
to the device does not block. Pixels are copied as bytes and normalized on the device, and maps are reduced on the
device, so that little crosses the bus. On a GPU each direction has its own CUDA stream, so that copies overlap with
computation.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..domain import Array

_TYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


class _Pinned:
    """A pinned host buffer for asynchronous copies. It grows as needed and is reused for every chunk."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        # torch's type annotations lack events.
        self._used = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def view(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Wait for the previous copy; return the buffer as a tensor."""
        self._used.synchronize()
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes > self._bytes.numel():
            self._bytes = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        return self._bytes[:n_bytes].view(dtype).view(*shape)

    def record_use(self) -> None:
        """Record that a copy from the buffer was just enqueued; `view` waits for it."""
        self._used.record()


class HostCopy:
    """An asynchronous copy of a tensor to the host, on a CUDA stream of its own."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream | None) -> None:
        if stream is None:
            self._host = tensor.cpu()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        # torch's type annotations lack events.
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
            self._arrived.record()
        tensor.record_stream(stream)  # keeps the allocator from reusing its memory before the copy

    def wait(self) -> Tensor:
        """Wait for the copy only, not for later work on the device; return the tensor on the host."""
        if self._host.is_pinned():
            self._arrived.synchronize()
        return self._host


class Staging:
    """Copies between the host and one device. Used on the thread that owns the device only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pinned = _Pinned() if device.type == "cuda" else None
        self._upload, self._download = (_stream(device) for _ in range(2))

    def to_device(self, examples: Sequence[Array], *, dtype: np.dtype[np.generic]) -> Tensor:
        """Copy examples of one shape, [...], to the device as [n, ...], converted to `dtype` on the way."""
        shape = (len(examples), *examples[0].shape)
        host = self._pinned.view(shape, _TYPES[dtype]) if self._pinned else torch.empty(shape, dtype=_TYPES[dtype])
        for row, example in zip(host.numpy(), examples, strict=True):
            np.copyto(row, example, casting="same_kind")
        if self._pinned is None or self._upload is None:
            return host.to(self._device)
        with torch.cuda.stream(self._upload):
            on_device = host.to(self._device, non_blocking=True)
            self._pinned.record_use()
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._upload)
        on_device.record_stream(computing)
        return on_device

    def to_host(self, tensor: Tensor) -> HostCopy:
        """Enqueue a copy of a tensor to the host, after its computation."""
        return HostCopy(tensor.detach(), self._download)


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    # torch's type annotations lack streams.
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def magnitudes(maps: Array) -> NDArray[np.floating]:
    """Return the largest absolute value of each map, [k], of [k, ...]; not finite where a map has such an element."""
    flat = maps.reshape(len(maps), -1)
    largest: NDArray[np.floating] = np.maximum(flat.max(axis=1, initial=0), -flat.min(axis=1, initial=0))
    return largest  # NaN propagates through each of the three


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalize pixels, uint8 [n, H, W, C], to inputs, [n, C, H, W]; mean and std, [C, 1, 1], are in pixel units.

    The result is contiguous: channels-last strides would select other convolution kernels and other last bits.
    """
    permuted = pixels.permute(0, 3, 1, 2)  # [n, C, H, W]
    inputs = torch.empty(permuted.shape, dtype=mean.dtype, device=pixels.device)
    return torch.sub(permuted, mean, out=inputs).div_(std)
