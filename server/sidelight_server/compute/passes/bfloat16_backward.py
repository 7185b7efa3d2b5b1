"""The mixed precision: the forward pass in float32, the products of the backward pass in bfloat16.

Rounding in the forward pass switches rectifiers on and off, and so changes which paths a gradient takes. Rounding in
the backward pass only perturbs values along the right paths, so the ranks of a map's pixels hardly change.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_CONVOLUTIONS = (torch.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d)
_LINEAR = (functional.linear, torch.ops.aten.linear.default, torch.ops.aten.linear)


class Bfloat16Backward(TorchFunctionMode):
    """While active, dense convolutions and linear layers compute the gradient of their input in bfloat16.

    Grouped convolutions stay in float32: bfloat16 kernels for them are slower on CPUs. TorchScript is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.n_products = 0  # of all passes so far
        self._rounded: dict[int, tuple[Tensor, Tensor]] = {}  # by id of a parameter, which is kept alive with it

    def forget(self) -> None:
        """Drop the rounded weights, after the weights have changed."""
        self._rounded.clear()

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Replace the two products; everything else runs as it is."""
        kwargs = kwargs or {}
        if function in _CONVOLUTIONS:
            return self._convolved(function, *args, **kwargs)
        if function in _LINEAR:
            return self._projected(function, *args, **kwargs)
        return function(*args, **kwargs)

    def _convolved(
        self,
        function: Callable[..., Tensor],
        input: Tensor,  # noqa: A002 — may be passed by name, as torch names it
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        if groups != 1 or isinstance(padding, str) or not self._applies(input):
            return function(input, weight, bias, stride, padding, dilation, groups)
        self.n_products += 1
        geometry = (_pair(stride), _pair(padding), _pair(dilation))
        convolved: Tensor = _Convolution.apply(input, weight, bias, self._round(weight), geometry)  # type: ignore[no-untyped-call]
        return convolved

    def _projected(
        self,
        function: Callable[..., Tensor],
        input: Tensor,  # noqa: A002 — as above
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        if not self._applies(input):
            return function(input, weight, bias)
        self.n_products += 1
        projected: Tensor = _Linear.apply(input, weight, bias, self._round(weight))  # type: ignore[no-untyped-call]
        return projected

    def _applies(self, input: Tensor) -> bool:  # noqa: A002 — as above
        return torch.is_grad_enabled() and input.requires_grad and input.dtype == torch.float32

    def _round(self, weight: Tensor) -> Tensor:
        if not isinstance(weight, nn.Parameter):  # computed in this pass, so keeping it would be a leak
            return weight.detach().to(torch.bfloat16)
        if id(weight) not in self._rounded:
            self._rounded[id(weight)] = weight, weight.detach().to(torch.bfloat16)
        return self._rounded[id(weight)][1]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: Tensor, geometry: Any) -> Tensor:
        ctx.rounded, ctx.geometry, ctx.shape = rounded, geometry, x.shape
        stride, padding, dilation = geometry
        return torch.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        grad_output = gradients[0].to(torch.bfloat16)
        is_last = grad_output.is_contiguous(memory_format=torch.channels_last) and not grad_output.is_contiguous()
        layout = torch.channels_last if is_last else torch.contiguous_format
        like = torch.empty(ctx.shape, dtype=grad_output.dtype, device=grad_output.device, memory_format=layout)
        grad_input, _, _ = torch.ops.aten.convolution_backward(
            grad_output, like, ctx.rounded, None, *ctx.geometry, False, [0, 0], 1, [True, False, False]
        )
        return grad_input.to(gradients[0].dtype), None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: Tensor) -> Tensor:
        ctx.rounded = rounded
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return (gradients[0].to(torch.bfloat16) @ ctx.rounded).to(gradients[0].dtype), None, None, None


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
