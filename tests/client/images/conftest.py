"""Pixels and floats for the tests of images."""

import numpy as np
import pytest
import torch

from support.pictures.arrays import noise


@pytest.fixture
def pixels() -> np.ndarray:
    return noise(40, 50)


@pytest.fixture
def exact() -> np.ndarray:
    """Model-ready examples, [3, 3, 32, 32], that every floating type holds exactly: sixteenths below 8."""
    values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return ((values * 16).round() / 16).clamp(-7.9375, 7.9375).numpy()
