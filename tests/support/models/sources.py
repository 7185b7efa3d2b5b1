"""For the tests of sources: a small network, its maps as torch computes them, and those of a server on a source."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import sidelight
import sidelight_server
import torch
from sidelight_server.errors import ConfigurationError
from sidelight_server.models import sources
from torch import Tensor, nn

SHAPE = (3, 16, 16)
N_CLASSES = 5


class Net(nn.Module):
    """Five logits of pictures of any size, with BatchNorm and dropout, which a mode would show."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.convolution = nn.Conv2d(SHAPE[0], 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(6, N_CLASSES)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(self.norm(self.convolution(x)).relu().mean((2, 3))))


def net() -> nn.Module:
    return Net().eval()


def examples(n: int = 5, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(5))


def expected_maps(logits_of: Callable[[Tensor], Tensor], x: Tensor) -> np.ndarray:
    """Return max over channels of |∂p/∂x|, p the largest softmax probability: the server's defaults."""
    x = x.clone().requires_grad_()
    scores = logits_of(x).softmax(1).amax(1)
    (gradients,) = torch.autograd.grad(scores.sum(), x)
    return gradients.abs().amax(1).numpy()


def served_maps(source: str, x: Tensor, **settings: object) -> np.ndarray:
    """Return the maps of a real server on a source, by a real client."""
    with (
        sidelight_server.serve(source, device="cpu", **settings) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        return client.attribute(x.numpy()).maps


def assert_serves(source: str, logits_of: Callable[[Tensor], Tensor], x: Tensor, **settings: object) -> None:
    maps, expected = served_maps(source, x, **settings), expected_maps(logits_of, x)
    assert expected.max() > 0
    # Rows of other chunks, and operators in another order, differ in the last digits of float32.
    np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5 * expected.max())


def refusal(source: str, weights: Path | None = None) -> str:
    """Return why a source cannot be loaded: one line."""
    try:
        sources.load(source, weights)
    except ConfigurationError as error:
        message = str(error)
        assert message.splitlines() == [message]
        return message
    raise AssertionError(f"{source} was loaded")
