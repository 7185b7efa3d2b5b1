"""A model of the shape of a chest X-ray classifier. Its pictures and its weights are synthetic: it knows no disease.

A radiograph here is a body, a spine, a heart, two dark lungs with ribs, and noise; "COVID" is a blurred bright spot in
one of the lungs.
"""

import itertools

import numpy as np
import torch
from torch import Tensor, nn

SIZE = 224


class Net(nn.Module):
    """In the manner of PyHealth's models: keywords in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 8, 16, 32)
        blocks = [
            # No padding: a frame of zeros would be something to see at the border.
            nn.Sequential(nn.Conv2d(n, m, 5, stride=2), nn.BatchNorm2d(m), nn.ReLU())
            for n, m in itertools.pairwise(channels)
        ]
        self.features = nn.Sequential(nn.AvgPool2d(2), *blocks)
        self.head = nn.Linear(2 * channels[-1], 2)

    def forward(self, image: Tensor, disease: Tensor | None = None) -> dict[str, Tensor]:
        features = self.features(image)
        logits = self.head(torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1))
        result = {"logit": logits, "y_prob": logits.softmax(dim=1)}
        if disease is not None:
            result["loss"] = nn.functional.cross_entropy(logits, disease)
        return result


def network() -> nn.Module:
    """Return the network untrained. `sidelight.toml` says where its weights and labels are, and what it takes."""
    return Net()


def radiograph(rng: np.random.Generator, *, sick: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return a synthetic picture, uint8 [224, 224, 1], and where its spot is, bool [224, 224]."""
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE  # [224, 224] each

    def ellipse(cx: float, cy: float, a: float, b: float, *, edge: float) -> np.ndarray:
        """Return 1 within and 0 without; a larger edge is a sharper one."""
        return 1 / (1 + np.exp(edge * (np.hypot((x - cx) / a, (y - cy) / b) - 1)))

    centres = [(side + rng.normal(0, 0.012), 0.48 + rng.normal(0, 0.012)) for side in (0.31, 0.69)]
    lungs = sum(ellipse(cx, cy, 0.15, 0.33, edge=16) for cx, cy in centres)
    picture = 0.1 + 0.5 * ellipse(0.5, 0.62, 0.48, 0.66, edge=25)
    picture += 0.12 * np.exp(-(((x - 0.5) / 0.05) ** 2)) - 0.4 * lungs
    picture += 0.2 * ellipse(0.56, 0.66, 0.13, 0.14, edge=8)
    arcs = y + 1.2 * (np.abs(x - 0.5) - 0.2) ** 2 + rng.uniform(0, 0.08)
    picture += 0.12 * np.exp(3 * np.cos(2 * np.pi * 11 * arcs) - 3) * lungs
    spot = np.zeros((SIZE, SIZE))
    if sick:
        cx, cy = centres[rng.integers(2)]
        cx, cy = cx + rng.uniform(-0.05, 0.05), cy + rng.uniform(-0.18, 0.1)
        spot = np.exp(-(((x - cx) / 0.055) ** 2 + ((y - cy) / 0.055) ** 2))
    picture += 0.35 * spot + rng.normal(0, 0.02, (SIZE, SIZE))
    return (255 * np.clip(picture, 0, 1)).astype(np.uint8)[..., None], spot > 0.2
