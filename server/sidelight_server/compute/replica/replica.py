"""The replica: a frozen copy of the caller's module in eval mode, which shares its weights."""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...config.options import KernelOptions
from ...errors import ConfigurationError
from ..passes.adapter import Adapter
from ..weights import ChangeDetector, address, tensors_of
from .batchnorm_fusion import COMPUTING, fuse_batchnorm

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# The attributes for gradient checkpointing in transformers, timm, torchvision and Swin. It does not change gradients,
# but runs each pass twice, or makes `torch.autograd.grad` raise.
_CHECKPOINTING = ("gradient_checkpointing", "grad_checkpointing", "use_checkpoint", "use_checkpointing", "with_cp")


@dataclass(frozen=True, slots=True)
class Isolation:
    """What a replica does not share with the caller's module."""

    owned: frozenset[str] | None = frozenset()  # tensors that a pass writes to, by name; None: every buffer
    keeps_hooks: bool = True  # forward hooks, which may be part of the computation


SHARED = Isolation()


def replicate(module: nn.Module, isolation: Isolation = SHARED) -> nn.Module:
    """Return a frozen copy of a module in eval mode that shares its parameters' and buffers' storage.

    The module itself is not changed; further training of it shows in the replica. `isolation` names the tensors to copy
    and whether forward hooks are kept. Backward and state-dict hooks are dropped, because they do not affect outputs.
    Tensors in attributes are detached from their graph; gradient checkpointing is switched off.
    """
    memo: dict[int, object] = {}
    for name, parameter in module.named_parameters():
        values = parameter.data.clone() if name in (isolation.owned or ()) else parameter.data
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for name, buffer in module.named_buffers():
        is_owned = isolation.owned is None or name in isolation.owned
        memo[id(buffer)] = buffer.detach().clone() if is_owned else buffer
    for each in _eager(module):
        memo |= {id(held): held for held in vars(each).values() if isinstance(held, Dataset)}
        memo |= {id(hooks): kept for hooks, kept in _hooks(each, isolation)}
        memo |= {id(held): held.detach().clone() for held in _with_graph(vars(each).values()) if id(held) not in memo}
    replica = _copy(module, memo)
    theirs = {id(each) for each in module.parameters()}
    for parameter in replica.parameters():  # deepcopy ignores the memo for TorchScript
        if parameter.requires_grad and id(parameter) not in theirs:
            parameter.detach_()  # works for non-leaf tensors too
    for each in _eager(replica):
        for switch in _CHECKPOINTING:
            if vars(each).get(switch) is True:
                setattr(each, switch, False)
    with contextlib.suppress(NotImplementedError):  # the mode of an exported program is fixed
        replica.eval()
    return replica


def n_hooks(module: nn.Module) -> int:
    """Return the number of hooks that run in a pass, without torch's own that compute weights."""
    kinds = (*_FORWARD_HOOKS, *_BACKWARD_HOOKS)
    hooks = (hook for each in _eager(module) for kind in kinds for hook in vars(each).get(kind, {}).values())
    return sum(not isinstance(hook, COMPUTING) for hook in hooks)


def _eager(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the submodules that are not TorchScript, whose attributes are not accessible."""
    return (each for each in module.modules() if not isinstance(each, torch.jit.ScriptModule))


def _hooks(module: nn.Module, isolation: Isolation) -> Iterator[tuple[object, object]]:
    """Yield a module's hook dictionaries that are filtered, each with its replacement in the replica."""
    # Filtered before the copy: a hook may refer to large objects, which deepcopy would copy.
    for kind in (*_BACKWARD_HOOKS, *_STATE_HOOKS, *(() if isolation.keeps_hooks else _FORWARD_HOOKS)):
        hooks = vars(module).get(kind)
        if hooks:
            yield hooks, type(hooks)((key, hook) for key, hook in hooks.items() if isinstance(hook, COMPUTING))


def _with_graph(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors that have a graph, also within containers: deepcopy raises for them."""
    for value in values:
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                yield value
        elif isinstance(value, Mapping):
            yield from _with_graph(value.values())
        elif isinstance(value, list | tuple | set):
            yield from _with_graph(value)


def weights_dtype(module: nn.Module) -> torch.dtype:
    """Return the type of a module's floating weights; float32 if it has none."""
    floating = (each for each in module.parameters() if each.is_floating_point())
    return next((each.dtype for each in floating), torch.float32)


class Replica:
    """A module's replica on a device, with the operator's kernel options applied.

    Without options, and on the module's own device, no weight is copied. If the caller replaces a tensor, or writes to
    one that was copied, `is_stale` becomes True and `refresh` makes the replica again from the current weights.
    """

    def __init__(
        self,
        detector: ChangeDetector,
        *,
        device: torch.device,
        options: KernelOptions,
        adapter: Adapter,
        trial: Tensor | None,
        isolation: Isolation,
    ) -> None:
        if options.precision == "mixed" and options.compile:
            raise ConfigurationError("precision: mixed has no effect on a compiled model; leave one of them unset")
        if options.cuda_graphs and device.type != "cuda":
            raise ConfigurationError(f"cuda_graphs: needs a CUDA device, the server runs on {device}")
        self._detector = detector
        self._device = device
        self._options = options
        self._adapter = adapter
        self._trial = trial
        self._isolation = isolation
        self._holds_copies = False
        self._seen = detector.check()
        self.dtype = _dtype(options, detector.module)
        self.n_folded = 0
        self.refresh()

    @property
    def is_stale(self) -> bool:
        """Whether the module's weights have changed in a way that the replica does not share."""
        now = self._detector.check()
        return now.replaced != self._seen.replaced or (self._holds_copies and now.written != self._seen.written)

    def refresh(self) -> None:
        """Make the replica from the module's current weights."""
        seen = self._detector.check()
        source, options = self._detector.module, self._options
        module = replicate(source, self._isolation).to(self._device)
        for name in ("fold", "compile", "cuda_graphs"):
            if getattr(options, name) and self._trial is None:
                raise ConfigurationError(
                    f"{name}: it is tried before it serves, which needs an input_size or a trial_size"
                )
        if options.fold and self._trial is not None:
            module = _copy(module, {}).requires_grad_(False)  # fusion writes to its weights
            self.n_folded = fuse_batchnorm(module, self._trial, adapter=self._adapter)
        if options.precision:
            module = module.to(self.dtype)
        if options.channels_last:
            # torch's type annotations lack the keyword.
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.plain: nn.Module = module  # for hooks and modes, which have no effect on a compiled module
        # Chunk sizes vary: dynamic=True compiles once for all of them, and once more for a single row.
        self.module: nn.Module = torch.compile(module, dynamic=True) if options.compile else module  # type: ignore[assignment]
        self._holds_copies = not options.is_exact or _addresses(module) != _addresses(source)
        self._seen = seen  # set last, so that the replica stays stale if making it fails


def _dtype(options: KernelOptions, module: nn.Module) -> torch.dtype:
    if options.precision == "mixed":
        return torch.float32
    return getattr(torch, options.precision) if options.precision else weights_dtype(module)


def _addresses(module: nn.Module) -> list[int]:
    return [address(each) for each in tensors_of(module)]


def _copy(module: nn.Module, memo: dict[int, object]) -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of torch about its own code
        return copy.deepcopy(module, memo)
