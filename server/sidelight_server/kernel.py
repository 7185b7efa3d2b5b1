"""The kernel: outputs and gradients of a chunk, on a replica of the model.

Everything here runs on the thread that owns the device. `torch.autograd.grad` is asked for the gradient at the probe
alone: no parameter gets a gradient, and nothing of the caller's module is written. (`zero_grad()` and `.backward()` on
a shared module crash the process once two threads do it.)
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .attribution import Aim, Score
from .errors import FailedPrecondition
from .methods.method import Layer, Probe, Rectifiers
from .probes import Guided, capture, chosen_layer, layers_of
from .scores import Head


@dataclass(frozen=True, slots=True)
class Gradients:
    """What one run of the kernel gives, on the device."""

    explained: Tensor  # [n], class indices
    scores: Tensor  # [n]
    predicted: Tensor  # [n], class indices
    probabilities: Tensor  # [n, K]
    output_shape: tuple[int, ...]  # K, or K, h, w
    gradients: Tensor | None = None  # [n, C, H, W], or [n, c, h, w] of a layer; None where none was wanted
    activations: Tensor | None = None  # [n, c, h, w] of a layer


def replicate(module: nn.Module) -> nn.Module:
    """Return a frozen copy of a module in eval mode that shares its parameters' and buffers' storage.

    The module itself is neither frozen, moved nor switched; training it further shows in the replica.
    """
    memo: dict[int, object] = {id(each): nn.Parameter(each.data, requires_grad=False) for each in module.parameters()}
    memo |= {id(each): each for each in module.buffers()}
    replica: nn.Module = copy.deepcopy(module, memo)
    theirs = {id(each) for each in module.parameters()}
    for each in replica.parameters():  # those that deepcopy made anew all the same, as it does for TorchScript
        if each.requires_grad and id(each) not in theirs:
            each.requires_grad_(False)
    return replica.eval()


class Kernel:
    """A replica of one model on one device.

    Raises whatever the module raises, and `TypeError` or `ValueError` where it returns something else than [n, K] or
    [n, K, h, w].
    """

    def __init__(self, module: nn.Module, *, device: torch.device, head: Head | None = None) -> None:
        floating = (each for each in module.parameters() if each.is_floating_point())
        self.dtype = next((each.dtype for each in floating), torch.float32)
        self.device = device
        self.head = head or Head()
        self._module = replicate(module).to(device)
        self._copies_inputs: bool | None = None  # not known before the first call

    @functools.cached_property
    def _hooked(self) -> nn.Module:
        """A replica of its own for what hooks into the module. No weight is copied."""
        return replicate(self._module)

    def run(
        self,
        inputs: Tensor,
        aims: Sequence[Aim],
        wanted: Sequence[Score],
        *,
        probe: Probe = None,
        gradient: bool = True,
    ) -> Gradients:
        """Return what each row, [C, H, W] of inputs, says of its own score of its own aim, and its gradient.

        A class beyond K is clamped: the caller, who learns K from the answer, refuses that row.
        """
        inputs = inputs.detach()
        if not gradient:
            with torch.no_grad():
                return self._read(self.outputs_of(inputs), aims, wanted)[0]
        match probe:
            case Layer(name):
                return self._at_layer(inputs, aims, wanted, name)
            case Rectifiers.GUIDED:
                with Guided() as guided:
                    read = self._at_input(inputs, aims, wanted)
                if not guided.n_rectifiers:
                    raise FailedPrecondition("method.guided_backpropagation: the model has no rectifier to guide")
                return read
            case None:
                return self._at_input(inputs, aims, wanted)

    def layers(self, inputs: Tensor) -> dict[str, tuple[int, int]]:
        """Return the layers that can be probed with such inputs, in the order in which they end: their h and w."""
        with torch.no_grad():
            return layers_of(self._hooked, lambda: self._hooked(inputs.clone()))

    def rows_touch(self, inputs: Tensor) -> bool:
        """Say whether one row's outputs depend on another row, for inputs of two rows, [2, C, H, W]."""
        inputs = inputs.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.outputs_of(inputs).flatten(1)  # [2, K]
            # Unequal weights: probabilities, all added, would be 1 whatever they depend on.
            weights = torch.linspace(1, 2, outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
            (gradients,) = torch.autograd.grad((outputs[0] * weights).sum(), inputs)
        return bool((gradients[1] != 0).any())

    def outputs_of(self, inputs: Tensor) -> Tensor:
        """Return the module's outputs, [n, K] or [n, K, h, w]."""
        return _checked(self._call(inputs), len(inputs))

    def _at_input(self, inputs: Tensor, aims: Sequence[Aim], wanted: Sequence[Score]) -> Gradients:
        inputs.requires_grad_()
        with torch.enable_grad():
            read, selected = self._read(self.outputs_of(inputs), aims, wanted)
            (gradients,) = torch.autograd.grad(selected.sum(), inputs)
        return replace(read, gradients=gradients)

    def _at_layer(self, inputs: Tensor, aims: Sequence[Aim], wanted: Sequence[Score], name: str) -> Gradients:
        if not name:  # the last with spatial extent, which is not known beforehand if the model takes any size
            name = chosen_layer(name, self.layers(inputs[:1]), [])
        # The graph begins at the layer: what lies before it is run without one.
        with torch.enable_grad(), capture(self._hooked, name) as captured:
            read, selected = self._read(_checked(self._hooked(inputs.clone()), len(inputs)), aims, wanted)
            (gradients,) = torch.autograd.grad(selected.sum(), captured.leaf[0])
        return replace(read, gradients=gradients, activations=captured.leaf[0].detach())

    def _read(self, outputs: Tensor, aims: Sequence[Aim], wanted: Sequence[Score]) -> tuple[Gradients, Tensor]:
        """Return what outputs say, and the scores, [n], with their graph."""
        with torch.no_grad():
            detached = outputs.detach()
            probabilities = self.head.probabilities(detached)  # [n, K]
            predicted = self.head.predicted(detached, probabilities)
            explained = _classes(aims, predicted, probabilities.shape[1])
        selected = self.head.select(outputs, explained, aims, wanted)
        shape = (probabilities.shape[1], *outputs.shape[2:])
        return Gradients(explained, selected.detach(), predicted, probabilities, shape), selected

    def _call(self, inputs: Tensor) -> object:
        """Run the module. One that begins with an in-place operation gets a copy: the points themselves stay as is."""
        if self._copies_inputs:
            return self._module(inputs.clone())
        if inputs.requires_grad:
            try:
                return self._module(inputs)
            except RuntimeError as error:
                if "a leaf Variable that requires grad" not in str(error):
                    raise
            self._copies_inputs = True
            return self._module(inputs.clone())
        if self._copies_inputs is False:
            return self._module(inputs)
        copied = inputs.clone()
        before = copied._version
        outputs = self._module(copied)
        self._copies_inputs = copied._version != before
        return outputs


def _checked(outputs: object, n: int) -> Tensor:
    if not isinstance(outputs, Tensor):
        raise TypeError(f"the model returned {type(outputs).__name__}, expected a tensor [n, K] or [n, K, h, w]")
    if outputs.ndim not in (2, 4) or outputs.shape[0] != n or 0 in outputs.shape:
        raise ValueError(f"the model returned {list(outputs.shape)} for {n} examples, expected [n, K] or [n, K, h, w]")
    return outputs


def _classes(aims: Sequence[Aim], predicted: Tensor, n_classes: int) -> Tensor:
    if all(aim.positive is None for aim in aims):
        return predicted
    given = torch.tensor([-1 if aim.positive is None else min(aim.positive, n_classes - 1) for aim in aims])
    given = given.to(predicted.device)
    return torch.where(given < 0, predicted, given)
