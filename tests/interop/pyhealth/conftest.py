"""The drop-in class in its three forms."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import sidelight
import torch
from sidelight.pyhealth import BasicGradientSaliencyMaps
from torch import Tensor, nn

from support.models.classifiers import Make, served


@pytest.fixture(params=["module", "client", "address"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Make the class on a module, wherever that runs."""
    with contextlib.ExitStack() as stack:

        def made(module: nn.Module, *args: Any, **options: Any) -> BasicGradientSaliencyMaps:
            model: Any = module
            if request.param != "module":
                model = stack.enter_context(served(module))
            if request.param == "client":
                model = stack.enter_context(sidelight.connect(model))
            return stack.enter_context(BasicGradientSaliencyMaps(model, *args, **options))

        yield made


@pytest.fixture
def batch(floats: Tensor) -> dict[str, Tensor]:
    return {"image": floats, "disease": torch.tensor([0, 1, 2, 3, 4])}
