"""Staging: examples to the device and maps back, through one buffer each way.

The rows of a chunk are copied once, out of the messages that brought them, into a buffer that is pinned where the
device is a GPU, so that the copy to the device need not block. Pixels travel as bytes and are normalised over there;
maps are reduced over there: only small things cross the bus.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .attribution import Array

_BYTES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}


class Buffer:
    """Host memory that grows to the largest chunk it has seen and is used again for every chunk."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def view(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the buffer as a tensor. The next call gives the same memory away again."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if n_bytes > self._bytes.numel():
            self._bytes = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._bytes[:n_bytes].view(dtype).view(*shape)


class Staging:
    """The way to one device and back. Used by the thread that owns the device alone."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._there = Buffer(pinned=device.type == "cuda")
        self._back = Buffer(pinned=device.type == "cuda")

    def to_device(self, examples: Sequence[Array], *, dtype: np.dtype[np.generic]) -> Tensor:
        """Copy examples of one shape, [...], to the device as [n, ...], converted to `dtype` on the way."""
        host = self._there.view((len(examples), *examples[0].shape), _BYTES[dtype])
        array = host.numpy()
        for row, example in enumerate(examples):
            np.copyto(array[row], example, casting="same_kind")
        return host.to(self._device, non_blocking=True)

    def to_host(self, tensor: Tensor) -> Array:
        """Copy a tensor to the host. The array is good until the next call."""
        tensor = tensor.detach()
        if self._device.type == "cuda":
            host = self._back.view(tensor.shape, tensor.dtype)
            host.copy_(tensor, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
            tensor = host
        array: Array = tensor.cpu().numpy()
        return array


def is_finite(array: Array) -> bool:
    """Say whether every element is finite: one sum, and the exact search only where that is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the model's input, [n, C, H, W], of pixels, uint8 [n, H, W, C]; mean and std, [C, 1, 1], are in pixels.

    The layout is made contiguous: channels-last strides would pick other convolution kernels, and other last bits.
    """
    permuted = pixels.permute(0, 3, 1, 2)  # [n, C, H, W]
    inputs = torch.empty(permuted.shape, dtype=mean.dtype, device=pixels.device)
    return torch.sub(permuted, mean, out=inputs).div_(std)
