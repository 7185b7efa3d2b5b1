"""Max-abs reduction as one Triton kernel, which reads each gradient once.

Three torch kernels (abs, amax, cast) would write and read the absolute gradients once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # pixels per program


# Triton has no type annotations.
@triton.jit  # type: ignore[untyped-decorator]
def _largest_absolute(  # type: ignore[no-untyped-def]
    gradients, maps, n_pixels, width, row_stride, channel_stride, y_stride, x_stride, channels: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * block + tl.arange(0, block)
    inside = pixel < n_pixels
    at = row * row_stride + (pixel // width) * y_stride + (pixel % width) * x_stride
    largest = tl.abs(tl.load(gradients + at, mask=inside, other=0))
    for channel in range(1, channels):
        value = tl.abs(tl.load(gradients + at + channel * channel_stride, mask=inside, other=0))
        # As in torch, NaN counts as the largest, so that an example with a NaN fails.
        largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
    tl.store(maps + row * n_pixels + pixel, largest.to(tl.float32), mask=inside)


def largest_absolute(gradients: Tensor) -> Tensor:
    """Return the maps, float32 [n, H, W], of gradients, [n, C, H, W], in any layout."""
    n, channels, height, width = gradients.shape
    maps = torch.empty((n, height, width), dtype=torch.float32, device=gradients.device)
    if maps.numel():
        grid = (n, triton.cdiv(height * width, BLOCK))
        _largest_absolute[grid](
            gradients, maps, height * width, width, *gradients.stride(), channels=channels, block=BLOCK
        )
    return maps
