"""Layer hooks: gradients at a layer, and guided backpropagation. Used on the device's thread only.

Hooks are registered on a separate replica, because hooks on a shared one would also see the rows of other requests.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import InvalidArgument
from .layers import first_tensor, with_first_tensor


@contextlib.contextmanager
def capture(module: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """Start the autograd graph at a layer's output. The list gets that output, the leaf of the graph, in the pass."""
    leaf: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: object, output: Any) -> Any:
        value = first_tensor(output)
        if value is None:
            raise InvalidArgument(f'method.layer: "{layer}" returns {type(output).__name__}, expected a tensor')
        if leaf:
            raise InvalidArgument(f'method.layer: "{layer}" runs more than once in a pass, expected a layer of one run')
        leaf.append(value.detach().requires_grad_())
        copy = leaf[0].clone()  # the next module may modify its input in place, and the leaf must not change
        return with_first_tensor(output, copy)

    handle = module.get_submodule(layer).register_forward_hook(cut)
    try:
        yield leaf
    finally:
        handle.remove()


NOTHING_TO_GUIDE = (
    "method.guided_backpropagation: the model has no rectifier to guide, expected a ReLU or ReLU6 (those in "
    "TorchScript and exported programs cannot be changed); use gradient, or serve the original module"
)


class _Guided(torch.autograd.Function):
    """A ReLU whose gradient passes only where it is positive and the input is within the bounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, upper: float) -> Tensor:
        y = x.clamp(0, upper)
        ctx.save_for_backward((y > 0) & (x < upper))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (passes,) = ctx.saved_tensors
        return gradients[0].clamp(min=0) * passes, None


class Guided(TorchFunctionMode):
    """Applies the guided rule to every ReLU, module or function, on the current thread."""

    _UPPER: ClassVar[dict[Any, float]] = {
        function: float("inf")
        for function in (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, Tensor.relu, Tensor.relu_)
    } | {nn.functional.relu6: 6.0}
    _IN_PLACE: ClassVar[tuple[Any, ...]] = (torch.relu_, nn.functional.relu_, Tensor.relu_)

    def __init__(self) -> None:
        super().__init__()
        self.n_rectifiers = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace a ReLU; call every other function unchanged."""
        named = kwargs or {}
        upper = self._UPPER.get(function)
        if function is nn.functional.hardtanh and _is_relu6(*args[1:], **named):
            upper = 6.0
        if upper is None:
            return function(*args, **named)
        self.n_rectifiers += 1
        x = args[0] if args else named["input"]
        y = _Guided.apply(x, upper)  # type: ignore[no-untyped-call]
        in_place = function in self._IN_PLACE or named.get("inplace") or (args and args[-1] is True)
        return x.copy_(y) if in_place else y


def _is_relu6(*given: Any, **named: Any) -> bool:
    bounds = dict(zip(("min_val", "max_val"), given, strict=False)) | named
    return (bounds.get("min_val"), bounds.get("max_val")) == (0, 6)
