"""The models that are measured: factories for `sidelight-server --model python:benchmarks.support.nets:…`."""

import torch
from sidelight_server import ModelSpec
from sidelight_server.models.sources.demo import efficientnet_lite0
from torch import Tensor, nn

from .held import without_reserve

SIZE = 224
SMALL = 64

__all__ = [
    "SIZE",
    "SMALL",
    "digits_cnn",
    "efficientnet_lite0",
    "resnet18",
    "resnet18_small",
    "resnet50",
    "resnet50_tf32",
    "small_cnn",
    "trimmed_cnn",
]


class Logits(nn.Module):
    """A transformers classifier as images in, logits out."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(pixel_values=x).logits


def resnet18() -> ModelSpec:
    """Return a ResNet-18 for 1,000 classes at 224² with random weights: speed does not depend on them."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000
    )
    return ModelSpec(
        Logits(ResNetForImageClassification(config)),
        input_size=(3, SIZE, SIZE),
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )


def resnet18_small() -> ModelSpec:
    """Return the same at 64², where rows are fast and large chunks pay off."""
    return resnet18().replace(input_size=(3, SMALL, SMALL))


def resnet50() -> ModelSpec:
    """Return a ResNet-50 for 1,000 classes at 224² with random weights."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    return resnet18().replace(module=Logits(ResNetForImageClassification(ResNetConfig(num_labels=1000))))


def resnet50_tf32() -> ModelSpec:
    """Return the same. Convolutions and products on a GPU may round float32 to TF32, in the whole process."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    return resnet50()


def small_cnn() -> ModelSpec:
    """Return a small CNN at 64², fast enough for tests of thousands of requests."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))
    return ModelSpec(module, input_size=(3, SMALL, SMALL))


def trimmed_cnn() -> ModelSpec:
    """Return the same, in a server that returns freed memory to the system at once."""
    without_reserve()
    return small_cnn()


def digits_cnn() -> ModelSpec:
    """Return a small CNN for gray pictures of 8×8, the size of scikit-learn's digits."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    return ModelSpec(module, input_size=(1, 8, 8))
