"""A factory for your own model, which `--model python:mine:digits` calls."""

from sidelight_server import ModelSpec
from torch import nn


def digits() -> ModelSpec:
    """Return an untrained CNN for gray 8 × 8 digits. Trained weights come from `--weights digits.safetensors`."""
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 10),
    )
    return ModelSpec(module, input_size=(1, 8, 8), class_names=[str(digit) for digit in range(10)])
