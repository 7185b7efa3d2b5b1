"""Max-abs reduction, the default map: the largest absolute gradient over the channels, for a whole chunk."""

import functools
import importlib.util

import torch
from torch import Tensor


def largest_absolute(gradients: Tensor) -> Tensor:
    """Return the maps, float32 [n, H, W], of gradients, [n, C, H, W]. NaN is propagated."""
    if gradients.device.type == "cuda" and _has_triton():
        from .max_abs_triton import largest_absolute as fused

        return fused(gradients)
    return gradients.abs().amax(dim=1).to(torch.float32)


@functools.cache
def _has_triton() -> bool:
    """Return whether Triton is installed; torch's CUDA builds for Linux include it."""
    return importlib.util.find_spec("triton") is not None
