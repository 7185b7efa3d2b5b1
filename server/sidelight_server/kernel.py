"""The kernel: outputs and input gradients of a chunk, on a replica of the model.

Everything here runs on the thread that owns the device. `torch.autograd.grad` is asked for the input's gradient alone:
no parameter gets a gradient, and nothing of the caller's module is written. (`zero_grad()` and `.backward()` on a
shared module crash the process once two threads do it.)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import scores
from .attribution import Score


@dataclass(frozen=True, slots=True)
class Gradients:
    """What one run of the kernel gives, on the device."""

    gradients: Tensor  # [n, C, H, W]
    explained: Tensor  # [n], class indices
    scores: Tensor  # [n]
    predicted: Tensor  # [n], class indices
    probabilities: Tensor  # [n, K]


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

    Raises whatever the module raises, and `TypeError` or `ValueError` where it returns something else than [n, K].
    """

    def __init__(self, module: nn.Module, *, device: torch.device, outputs: scores.Outputs) -> None:
        floating = (each for each in module.parameters() if each.is_floating_point())
        self.dtype = next((each.dtype for each in floating), torch.float32)
        self.device = device
        self.outputs: scores.Outputs = outputs
        self._module = replicate(module).to(device)
        self._copies_inputs = False

    def run(self, inputs: Tensor, targets: Sequence[int | None], wanted: Sequence[Score]) -> Gradients:
        """Return each row's gradient, [n, C, H, W], of its own score of its own target; None is the predicted class.

        A target beyond K is clamped: the caller, who learns K from the answer, refuses that row.
        """
        inputs = inputs.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.outputs_of(inputs)  # [n, K]
            predicted = outputs.detach().argmax(dim=1)
            explained = _targets(targets, predicted, outputs.shape[1])
            selected = scores.select(outputs, explained, wanted, self.outputs)
            (gradients,) = torch.autograd.grad(selected.sum(), inputs)
        with torch.no_grad():
            probabilities = scores.probabilities(outputs.detach(), self.outputs)
        return Gradients(gradients, explained, selected.detach(), predicted, probabilities)

    def rows_touch(self, inputs: Tensor) -> bool:
        """Say whether one row's outputs depend on another row, for inputs of two rows, [2, C, H, W]."""
        inputs = inputs.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self.outputs_of(inputs)  # [2, K]
            # Unequal weights: probabilities, all added, would be 1 whatever they depend on.
            weights = torch.linspace(1, 2, outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
            (gradients,) = torch.autograd.grad((outputs[0] * weights).sum(), inputs)
        return bool((gradients[1] != 0).any())

    def outputs_of(self, inputs: Tensor) -> Tensor:
        """Return the module's outputs, [n, K], K at least 2."""
        outputs = self._call(inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"the model returned {type(outputs).__name__}, expected a tensor [n, K]")
        if outputs.ndim != 2 or outputs.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"the model returned {list(outputs.shape)} for {inputs.shape[0]} examples, expected [n, K]"
            )
        if outputs.shape[1] < 2:
            raise ValueError("the model returned [n, 1]; models of a single output are not served yet")
        return outputs

    def _call(self, inputs: Tensor) -> object:
        if self._copies_inputs:
            return self._module(inputs.clone())
        try:
            return self._module(inputs)
        except RuntimeError as error:
            # A model that begins with an in-place operation must not have the leaf itself.
            if "a leaf Variable that requires grad" not in str(error):
                raise
        self._copies_inputs = True
        return self._module(inputs.clone())


def _targets(targets: Sequence[int | None], predicted: Tensor, n_classes: int) -> Tensor:
    if all(target is None for target in targets):
        return predicted
    given = torch.tensor([-1 if target is None else min(target, n_classes - 1) for target in targets])
    given = given.to(predicted.device)
    return torch.where(given < 0, predicted, given)
