"""The usual map of a whole chunk: torch's own operations are the oracle of the fused kernel, to the last bit.

Without a GPU the fused kernel runs in Triton's interpreter: `TRITON_INTERPRET=1 pytest -k test_reduction`.
"""

from collections.abc import Callable

import pytest
import torch
from sidelight_server.compute.max_abs import largest_absolute
from sidelight_server.methods.channels import Channels, Magnitude, reduce
from torch import Tensor

SHAPES = [(1, 1, 1, 1), (3, 3, 32, 32), (2, 5, 7, 201), (4, 1, 33, 31)]


def gradients(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_what_each_row_alone_is_reduced_to(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = gradients(shape, dtype, device)
    alone = [reduce(each, Channels.MAX_ABS, Magnitude.ABSOLUTE).float() for each in x]
    assert torch.equal(largest_absolute(x), torch.stack(alone))


@pytest.mark.requires("triton")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_the_fused_kernel_gives_the_same_bytes(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str
) -> None:
    fused = _fused(device)
    x = gradients(shape, dtype, device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(fused(x), x.abs().amax(dim=1).float())


@pytest.mark.requires("triton")
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_the_fused_kernel_hides_nothing_that_is_not_finite(odd: float, device: str) -> None:
    fused = _fused(device)
    x = gradients((2, 3, 8, 8), torch.float32, device)
    for channel in range(3):
        marked = x.clone()
        marked[1, channel, 2, 3] = odd
        torch.testing.assert_close(fused(marked), marked.abs().amax(dim=1), rtol=0, atol=0, equal_nan=True)


def _fused(device: str) -> Callable[[Tensor], Tensor]:
    from sidelight_server.compute.max_abs_triton import largest_absolute

    return largest_absolute
