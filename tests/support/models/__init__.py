"""Small models for the tests, with fixed weights."""

import torch
from sidelight_server import ModelSpec
from torch import Tensor, nn

N_CLASSES = 10
LABELS = ("ant", "bee", "cat", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis")  # two classes are called "cat"


def small_cnn(channels: int = 3, *, size: int = 32, seed: int = 0) -> nn.Module:
    """A CNN with BatchNorm, max-pooling and dropout: [N, C, size, size] to ten logits."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16 * (size // 2) ** 2, N_CLASSES),
    )
    with torch.no_grad():  # statistics that eval mode would show, were they not used
        norm = module[1]
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 1.5)
    return module


def sized_cnn() -> ModelSpec:
    """The small CNN with its input size, so that it takes files: `python:support.models:sized_cnn`."""
    return ModelSpec(small_cnn(), input_size=(3, 32, 32), name="small")


class Linear(nn.Module):
    """Logits that are linear in the input: its maps have a closed form."""

    def __init__(self, *, shape: tuple[int, int, int] = (3, 4, 5), seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        self.linear = nn.Linear(shape[0] * shape[1] * shape[2], N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))
