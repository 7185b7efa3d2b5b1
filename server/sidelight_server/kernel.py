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

    def run(self, inputs: Tensor, targets: Sequence[int | None], wanted: Sequence[Score]) -> Gradients:
        """Return each row's gradient, [n, C, H, W], of its own score of its own target; None is the predicted class.

        A target beyond K is clamped: the caller, who learns K from the answer, refuses that row.
        """
        inputs = inputs.detach().requires_grad_()
        with torch.enable_grad():
            outputs = self._forward(inputs)  # [n, K]
            predicted = outputs.detach().argmax(dim=1)
            explained = _targets(targets, predicted, outputs.shape[1])
            selected = scores.select(outputs, explained, wanted, self.outputs)
            (gradients,) = torch.autograd.grad(selected.sum(), inputs)
        with torch.no_grad():
            probabilities = scores.probabilities(outputs.detach(), self.outputs)
        return Gradients(gradients, explained, selected.detach(), predicted, probabilities)

    def _forward(self, inputs: Tensor) -> Tensor:
        outputs = self._module(inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"the model returned {type(outputs).__name__}, expected a tensor [n, K]")
        if outputs.ndim != 2 or outputs.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"the model returned {list(outputs.shape)} for {inputs.shape[0]} examples, expected [n, K]"
            )
        return outputs


def _targets(targets: Sequence[int | None], predicted: Tensor, n_classes: int) -> Tensor:
    if all(target is None for target in targets):
        return predicted
    given = torch.tensor([-1 if target is None else min(target, n_classes - 1) for target in targets])
    given = given.to(predicted.device)
    return torch.where(given < 0, predicted, given)
