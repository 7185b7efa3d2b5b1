"""The computation of every peer: from pixels to the saliency of the predicted class and the prediction.

Imported in the peers' own environments: torch, numpy and, for Captum, captum.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Pixels = NDArray[np.uint8]  # [n, H, W, C]

MODEL = "model.pt2"  # in the folder that all processes share
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Explained(NamedTuple):
    """The answer for n images."""

    maps: NDArray[np.float32]  # [n, H, W], the largest |d probability of the predicted class| of the channels
    predicted: NDArray[np.int32]  # [n]
    probabilities: NDArray[np.float32]  # [n], of the predicted classes


def load(folder: Path, *, threads: int) -> nn.Module:
    """Return the exported model, whose maps are bit-equal to its source's. `threads` are those of one operation."""
    torch.set_num_threads(threads)
    return torch.export.load(folder / MODEL).module()


def explainer(module: nn.Module, *, input_only: bool) -> "InputOnly | Captum":
    """Return the plain gradient, or Captum's class."""
    return InputOnly(module) if input_only else Captum(module)


def prepared(pixels: Pixels) -> Tensor:
    """Return the model's input, float32 [n, C, H, W]. Contiguous, because torch chooses its kernels by the strides."""
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None].mul(255).float() for each in (MEAN, STD))
    channels_first = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return (channels_first.float() - mean) / std


class InputOnly:
    """One forward and one backward pass; only the gradient with respect to the input."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.requires_grad_(False)

    def explain(self, pixels: Pixels) -> Explained:
        """Return the answer for pixels."""
        x = prepared(pixels).requires_grad_()
        probabilities, predicted = self.module(x).softmax(dim=1).max(dim=1)
        (gradient,) = torch.autograd.grad(probabilities.sum(), x)
        return explained(gradient.abs().amax(dim=1), predicted, probabilities)


class Captum:
    """Captum's `Saliency` at its fastest: for the largest probability, so that one forward pass also predicts."""

    def __init__(self, module: nn.Module) -> None:
        from captum.attr import Saliency

        self.module = module.requires_grad_(False)
        self.saliency = Saliency(self._largest)

    def explain(self, pixels: Pixels) -> Explained:
        """Return the answer for pixels."""
        gradient = self.saliency.attribute(prepared(pixels).requires_grad_())
        return explained(gradient.amax(dim=1), self._predicted, self._probabilities)

    def _largest(self, x: Tensor) -> Tensor:
        self._probabilities, self._predicted = self.module(x).softmax(dim=1).max(dim=1)
        return self._probabilities


def explained(maps: Tensor, predicted: Tensor, probabilities: Tensor) -> Explained:
    """Convert tensors to an answer."""
    return Explained(
        maps.detach().numpy(), predicted.numpy().astype(np.int32), probabilities.detach().numpy().astype(np.float32)
    )
