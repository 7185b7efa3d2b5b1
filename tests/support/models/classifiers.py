"""Classifiers as PyHealth's models are called, and the drop-in class on them."""

import contextlib
from collections.abc import Callable, Iterator

import sidelight_server
import torch
from sidelight.pyhealth import BasicGradientSaliencyMaps
from torch import Tensor, nn

from support.models import small_cnn

Make = Callable[..., BasicGradientSaliencyMaps]


class Classifier(nn.Module):
    """A model with PyHealth's call."""

    def __init__(self, logits: nn.Module, activation: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.logits = logits
        self.activation = activation

    def forward(self, image: Tensor, disease: Tensor | None = None) -> dict[str, Tensor]:
        return {"y_prob": self.activation(self.logits(image))}


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


def flat(n_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, n_classes))


def classifier(kind: str) -> nn.Module:
    torch.manual_seed(1)
    match kind:
        case "multiclass":
            return Classifier(small_cnn(), softmax)
        case "binary":
            return Classifier(flat(1))
        case "multilabel":
            return Classifier(flat(5))
        case "dense":
            return Classifier(nn.Conv2d(3, 4, 5, stride=3), softmax)
        case "dense, one output":
            return Classifier(nn.Conv2d(3, 1, 5, stride=3))
        case _:  # dense of one pixel
            return Classifier(nn.Conv2d(3, 4, 32), softmax)


@contextlib.contextmanager
def served(module: nn.Module) -> Iterator[str]:
    with sidelight_server.serve(
        sidelight_server.ModelSpec(module, input_size=(3, 32, 32), name="served"),
        device="cpu",
        threads=torch.get_num_threads(),
        max_chunk_rows=64,
    ) as address:
        yield address


def gradient(module: nn.Module, images: Tensor, classes: list[int]) -> Tensor:
    """Return the largest absolute gradient of these classes' probabilities."""
    inputs = images.clone().requires_grad_()
    probabilities = module.eval()(inputs)["y_prob"]
    scores = probabilities.gather(1, torch.tensor(classes)[:, None]).sum()
    return torch.autograd.grad(scores, inputs)[0].abs().amax(dim=1)
