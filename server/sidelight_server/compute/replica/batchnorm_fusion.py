"""BatchNorm fusion: folds a BatchNorm's scale and shift into the convolution or linear layer before it, in eval mode.

Pairs are found by data flow, not by names: the tensor object that one module returns is the one that the other
receives. Hooks cannot see everything, such as a second reader of that tensor, so a trial compares outputs and gradients
before and after.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.hooks import RemovableHandle

from ...errors import ConfigurationError
from ..passes.adapter import PLAIN, Adapter

# torch's own hooks that compute a weight before each pass: they are part of the network.
COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Relative to the largest output. In float64 a correct fusion changes outputs by at most 1e-12, a wrong one far more.
TOLERANCE = 1e-8
SINGLE_TOLERANCE = 1e-3  # if the module cannot run in float64


def fuse_batchnorm(module: nn.Module, inputs: Tensor, *, adapter: Adapter = PLAIN) -> int:
    """Fuse all BatchNorms that can be fused into the layers before them, in place; return their number.

    `module` must own its weights. `inputs` are trial inputs, [n, C, H, W]. Raises `ConfigurationError` if fusion
    changes outputs or gradients.
    """
    with torch.no_grad():
        pairs = list(_pairs(module, inputs, adapter))
    if pairs:
        _try(module, inputs, pairs, adapter)
        _replace(module, pairs)
    return len(pairs)


def _replace(module: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    for first, norm in pairs:
        folded = module.get_submodule(norm)
        _fold_into(module.get_submodule(first), folded)
        parent, _, name = norm.rpartition(".")
        setattr(module.get_submodule(parent), name, _after(folded) or nn.Identity())


def _try(module: nn.Module, inputs: Tensor, pairs: Sequence[tuple[str, str]], adapter: Adapter) -> None:
    """Fuse a copy, in float64 if the module supports it, and compare outputs and gradients."""
    for dtype, tolerance in ((torch.float64, TOLERANCE), (inputs.dtype, SINGLE_TOLERANCE)):
        try:
            trial, converted = copy.deepcopy(module).to(dtype), inputs.to(dtype)
            before = _outputs(trial, converted, adapter)
        except (RuntimeError, TypeError):  # the module fixes a type somewhere, or the device has no float64
            if dtype == inputs.dtype:
                raise
            continue
        _replace(trial, pairs)
        try:
            after = _outputs(trial, converted, adapter)
        except AttributeError as error:
            raise ConfigurationError(
                f"fold: the model reads an attribute of a BatchNorm that would be folded ({error}); leave fold unset"
            ) from error
        # Only outputs in float32: a ReLU at a tie may flip, which moves single elements of the gradient.
        compared = zip(("outputs", "gradients"), before, after, strict=True)
        for what, was, is_now in list(compared)[: 2 if dtype == torch.float64 else 1]:
            apart = float((is_now - was).abs().max() / was.abs().max().clamp_min(1e-30))
            if not apart <= tolerance:
                raise ConfigurationError(
                    f"fold: with BatchNorm folded the model's {what} move by {apart:.1e} of the largest: something "
                    "besides the norm reads what its convolution returns; leave fold unset"
                )
        return


def _pairs(module: nn.Module, inputs: Tensor, adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Yield names of layers and BatchNorms called exactly once, where the layer's output is the norm's input."""
    returned: list[tuple[str, Tensor]] = []  # keeps the tensors alive, so that no id is reused
    received: list[tuple[str, Tensor]] = []
    calls: Counter[str] = Counter()
    hooks: list[RemovableHandle] = []

    def watch(name: str, each: nn.Module) -> None:
        def before_call(_module: nn.Module, arguments: tuple[object, ...]) -> None:
            calls[name] += 1
            if arguments and isinstance(arguments[0], Tensor) and _after(each):
                received.append((name, arguments[0]))

        def after_call(_module: nn.Module, _arguments: object, output: object) -> None:
            if isinstance(output, Tensor) and isinstance(each, (*_CONVOLUTIONS, nn.Linear)):
                returned.append((name, output))

        hooks.extend((each.register_forward_pre_hook(before_call), each.register_forward_hook(after_call)))

    for name, each in module.named_modules():
        if _after(each) or isinstance(each, (*_CONVOLUTIONS, nn.Linear)):  # one of a convolution's subclass may pad
            watch(name, each)
    try:
        adapter.call(module, inputs.clone())
    finally:
        for hook in hooks:
            hook.remove()
    for norm, tensor in received:
        before = [name for name, other in returned if other is tensor]
        if len(before) == 1 and calls[norm] == calls[before[0]] == 1 and _is_fixed(module.get_submodule(norm)):
            yield before[0], norm


def _after(norm: nn.Module) -> nn.Module | None:
    """Return what a BatchNorm applies after normalizing; None if it is no BatchNorm or an unknown subclass.

    A subclass may compute anything. timm's `BatchNormAct2d` (norm, dropout, activation) is supported: it is recognized
    by its attributes `drop` and `act`, and the trial shows whether that was right.
    """
    kind = type(norm).__bases__[0] if parametrize.is_parametrized(norm) else type(norm)
    if kind in _NORMS:
        return nn.Identity()
    drop, activation = getattr(norm, "drop", None), getattr(norm, "act", None)
    if isinstance(norm, _NORMS) and isinstance(drop, nn.Module) and isinstance(activation, nn.Module):
        return nn.Sequential(drop, activation)
    return None


def _is_fixed(norm: nn.Module) -> bool:
    return norm.running_mean is not None and norm.running_var is not None


def _freeze_computed(module: nn.Module) -> None:
    """Replace a weight and bias that are computed before each pass by their current values."""
    if parametrize.is_parametrized(module):
        # Not `remove_parametrizations`: it changes the class, which copies share with the caller's module.
        computed = {name: getattr(module, name) for name in dict(module.parametrizations.named_children())}  # type: ignore[union-attr]
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for name, value in computed.items():
            module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, COMPUTING)]:
        hooks.pop(key)(module, ())
    for name in ("weight", "bias"):
        value = getattr(module, name)
        if isinstance(value, Tensor) and name not in module._parameters:
            delattr(module, name)
            module.register_parameter(name, nn.Parameter(value.detach(), requires_grad=False))


def _fold_into(first: nn.Module, norm: nn.Module) -> None:
    for each in (first, norm):
        _freeze_computed(each)
    fuse = fuse_linear_bn_weights if isinstance(first, nn.Linear) else fuse_conv_bn_weights
    weight, bias = fuse(first.weight, first.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)  # type: ignore[arg-type]
    first.weight = nn.Parameter(weight.detach(), requires_grad=False)
    first.bias = nn.Parameter(bias.detach(), requires_grad=False)


def _outputs(module: nn.Module, inputs: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    leaf = inputs.detach().clone().requires_grad_()
    with torch.enable_grad():
        outputs = adapter(module, leaf * 1)
        (gradient,) = torch.autograd.grad(outputs.square().sum(), leaf)
    return outputs.detach(), gradient
