"""The default map of a whole chunk: the largest absolute gradient over the channels, in float32."""

import functools
import importlib.util

import torch
from torch import Tensor


def largest_absolute(gradients: Tensor) -> Tensor:
    """Return the maps, float32 [n, H, W], of gradients, [n, C, H, W]. What is no number stays none."""
    if gradients.device.type == "cuda" and _has_triton():
        from .max_abs_triton import largest_absolute as fused

        return fused(gradients)
    return gradients.abs().amax(dim=1).to(torch.float32)


@functools.cache
def _has_triton() -> bool:
    """Say whether Triton is there, which comes with torch's own builds for CUDA on Linux."""
    return importlib.util.find_spec("triton") is not None
