"""A model of the shape of a chest X-ray classifier. Its pictures and its weights are synthetic: it knows no disease.

A radiograph here is two dark lungs, ribs and noise; "COVID" is a blurred bright spot in one of the lungs.
"""

import itertools

import numpy as np
import torch
from sidelight_server import ModelSpec
from torch import Tensor, nn

SIZE = 224
LABELS = ("Normal", "COVID")
MEAN, STD = 0.5, 0.25


class Net(nn.Module):
    """In the manner of PyHealth's models: keywords in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 8, 16, 32)
        blocks = [
            nn.Sequential(nn.Conv2d(n, m, 5, stride=2, padding=2), nn.BatchNorm2d(m), nn.ReLU())
            for n, m in itertools.pairwise(channels)
        ]
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(2 * channels[-1], len(LABELS))

    def forward(self, image: Tensor, disease: Tensor | None = None) -> dict[str, Tensor]:
        features = self.features(image)
        logits = self.head(torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1))
        result = {"logit": logits, "y_prob": logits.softmax(dim=1)}
        if disease is not None:
            result["loss"] = nn.functional.cross_entropy(logits, disease)
        return result


def network() -> ModelSpec:
    """Return the network untrained; its weights come from a file."""
    return ModelSpec(Net(), input_size=(1, SIZE, SIZE), mean=[MEAN], std=[STD], labels=LABELS)


def radiograph(rng: np.random.Generator, *, sick: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return a synthetic picture, uint8 [224, 224, 1], and where its spot is, bool [224, 224]."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE  # [224, 224] each
    picture = 0.75 - 0.2 * np.hypot(x - 0.5, y - 0.5)
    centres = [(side + rng.normal(0, 0.01), 0.52 + rng.normal(0, 0.01)) for side in (0.32, 0.68)]
    for cx, cy in centres:
        lung = 1 / (1 + np.exp(30 * (np.hypot((x - cx) / 0.14, (y - cy) / 0.3) - 1)))
        picture -= 0.45 * lung
    picture += 0.06 * np.sin(2 * np.pi * (y * 11 + 2 * np.abs(x - 0.5)) + rng.uniform(0, 6))
    spot = np.zeros((SIZE, SIZE))
    if sick:
        cx, cy = centres[rng.integers(2)]
        cx, cy = cx + rng.uniform(-0.04, 0.04), cy + rng.uniform(-0.15, 0.15)
        spot = np.exp(-(((x - cx) / 0.045) ** 2 + ((y - cy) / 0.045) ** 2))
    picture += 0.35 * spot + rng.normal(0, 0.03, (SIZE, SIZE))
    return (255 * np.clip(picture, 0, 1)).astype(np.uint8)[..., None], spot > 0.2
