"""The replica: what a kernel runs instead of the caller's module. It is frozen, in eval mode, and nobody else's."""

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .errors import ConfigurationError
from .folding import fold
from .models.adapter import Adapter
from .options import DTYPES, KernelOptions


def replicate(module: nn.Module) -> nn.Module:
    """Return a frozen copy of a module in eval mode that shares its parameters' and buffers' storage.

    The module itself is neither frozen, moved nor switched; training it further shows in the replica.
    """
    memo: dict[int, object] = {id(each): nn.Parameter(each.data, requires_grad=False) for each in module.parameters()}
    memo |= {id(each): each for each in module.buffers()}
    memo |= {id(each): each for each in _datasets(module)}
    replica = _copied(module, memo)
    theirs = {id(each) for each in module.parameters()}
    for each in replica.parameters():  # those that deepcopy made anew all the same, as it does for TorchScript
        if each.requires_grad and id(each) not in theirs:
            each.detach_()  # which needs no leaf
    with contextlib.suppress(NotImplementedError):  # an exported program is in one mode for ever
        replica.eval()
    return replica


def _datasets(module: nn.Module) -> Iterator[object]:
    """Yield the data sets that modules keep, as PyHealth's do: gigabytes that no pass needs a copy of."""
    return (held for each in module.modules() for held in vars(each).values() if isinstance(held, Dataset))


def weights_dtype(module: nn.Module) -> torch.dtype:
    """Return the type that a module's weights have; float32 where it has none."""
    floating = (each for each in module.parameters() if each.is_floating_point())
    return next((each.dtype for each in floating), torch.float32)


class Replica:
    """A module's replica on a device, prepared as the operator chose.

    Without options, and on the module's own device, no weight is copied. Otherwise the copies are made again once the
    caller has written to the weights, so that a map is of the weights whose digest its answer tells.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        device: torch.device,
        options: KernelOptions,
        adapter: Adapter,
        trial: Tensor | None,
    ) -> None:
        if options.cuda_graphs and device.type != "cuda":
            raise ConfigurationError(f"cuda_graphs: needs a CUDA device, the server runs on {device}")
        self._source = module
        self._device = device
        self._options = options
        self._adapter = adapter
        self._trial = trial
        self._tensors = [*module.parameters(), *module.buffers()]
        self._versions: list[int] = []
        self._holds_copies = not options.is_exact or any(each.device != device for each in self._tensors)
        self.dtype = DTYPES[options.precision] if options.precision else weights_dtype(module)
        self.n_folded = 0
        self._make()

    @property
    def is_stale(self) -> bool:
        """Whether the caller has written to the weights since the copies were made."""
        return self._holds_copies and self._versions != self._now()

    def refresh(self) -> None:
        """Make the copies again."""
        self._make()

    def _make(self) -> None:
        versions = self._now()
        module, options = replicate(self._source).to(self._device), self._options
        for name in ("fold", "compile", "cuda_graphs"):
            if getattr(options, name) and self._trial is None:
                raise ConfigurationError(
                    f"{name}: it is tried before it serves, which needs an input_size or a trial_size"
                )
        if options.fold and self._trial is not None:
            module = _owning(module)
            self.n_folded = fold(module, self._trial, adapter=self._adapter)
        if options.precision:
            module = module.to(self.dtype)
        if options.channels_last:
            # torch's own annotations leave the keyword out.
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.plain: nn.Module = module  # for hooks and modes, which a compiled one would not see
        # Sizes of chunks vary: one compilation for all of them, and one more for a row alone.
        self.module: nn.Module = torch.compile(module, dynamic=True) if options.compile else module  # type: ignore[assignment]
        self._versions = versions  # not before: copies that could not be made again must stay stale

    def _now(self) -> list[int]:
        return [0 if each.is_inference() else each._version for each in self._tensors]


def _owning(module: nn.Module) -> nn.Module:
    """Return a replica with weights of its own, to be written to."""
    return _copied(module, {}).requires_grad_(False)


def _copied(module: nn.Module, memo: dict[int, object]) -> nn.Module:
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch's at itself, of exported programs
        return copy.deepcopy(module, memo)
