"""BatchNorm fusion: in eval mode a BatchNorm is a scale and a shift, so it can join the convolution before it.

Which norm comes after which convolution is found by what flows, not by names: the very tensor that one returned is the
very tensor that the other received. What hooks do not see, such as a second reader of that tensor, the trial shows.
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

from ..errors import ConfigurationError
from .adapter import PLAIN, Adapter

# torch's own hooks that compute a weight before each pass: part of the network, not a visitor's.
COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Of the largest output: in float64 a right fold moves them by 1e-12 at the most, a wrong one by far more.
TOLERANCE = 1e-8
SINGLE_TOLERANCE = 1e-3  # where a module cannot run in float64


def fuse_batchnorm(module: nn.Module, inputs: Tensor, *, adapter: Adapter = PLAIN) -> int:
    """Fold what can be folded of a replica, which must own its weights; return how many norms were.

    `inputs` are a trial, [n, C, H, W]. `ConfigurationError` where outputs or gradients are not what they were.
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
    """Fold a copy, in float64 if the module can run so, and compare."""
    for dtype, tolerance in ((torch.float64, TOLERANCE), (inputs.dtype, SINGLE_TOLERANCE)):
        try:
            trial, converted = copy.deepcopy(module).to(dtype), inputs.to(dtype)
            before = _outputs(trial, converted, adapter)
        except (RuntimeError, TypeError):  # it has a type of its own somewhere inside, or the device lacks this one
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
        # In float32 a ReLU at a tie may open: a gradient's few elements move then, and outputs hardly do.
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
    """Yield the names of convolutions and norms that were called once, the one's output being the other's input."""
    returned: list[tuple[str, Tensor]] = []  # the tensors are held: the address of one that is gone may be used again
    received: list[tuple[str, Tensor]] = []
    calls: Counter[str] = Counter()
    hooks: list[RemovableHandle] = []

    def watch(name: str, each: nn.Module) -> None:
        def came(_module: nn.Module, arguments: tuple[object, ...]) -> None:
            calls[name] += 1
            if arguments and isinstance(arguments[0], Tensor) and _after(each):
                received.append((name, arguments[0]))

        def went(_module: nn.Module, _arguments: object, output: object) -> None:
            if isinstance(output, Tensor) and isinstance(each, (*_CONVOLUTIONS, nn.Linear)):
                returned.append((name, output))

        hooks.extend((each.register_forward_pre_hook(came), each.register_forward_hook(went)))

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
    """Return what a BatchNorm does after it has normalised; None for what is no BatchNorm, or one of an unknown kind.

    A subclass may do anything. The one that is known is timm's `BatchNormAct2d`, a norm, a dropout and an activation:
    it is recognised by these two attributes, and the trial shows whether it was.
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


def _settle(module: nn.Module) -> None:
    """Make the weight and the bias, where something computes them before each pass, what they are now."""
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
        _settle(each)
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
