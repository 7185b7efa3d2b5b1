"""Half precision: the model's results are rounded, sums over rows are not."""

import asyncio

import numpy as np
import pytest
import torch
from sidelight_server import (
    RISE,
    Channels,
    Constant,
    Engine,
    ExpectedGradients,
    IntegratedGradients,
    ModelSpec,
    Occlusion,
    Request,
    Score,
    Settings,
    SmoothGrad,
)
from torch import Tensor, nn

from support.models import Linear, small_cnn

pytestmark = pytest.mark.slow


def explain(module: nn.Module, x: Tensor, method: object, **asked: object) -> np.ndarray:
    with Engine([ModelSpec(module)], Settings(device="cpu", max_chunk_rows=64)) as engine:
        request = Request(x.numpy(), method=method, channels=Channels.NONE, **asked)
        answer = asyncio.run(engine.attribute(request))
    assert not answer.failures
    return answer.maps


MANY = {
    "integrated gradients": IntegratedGradients(steps=400),
    "smoothgrad": SmoothGrad(samples=400, noise_level=0.05),
    "expected gradients": ExpectedGradients(samples=400),
    "occlusion": Occlusion(window=(16, 16), stride=(1, 1)),
    "rise": RISE(masks=600),
}


@pytest.mark.parametrize("method", MANY.values(), ids=MANY)
def test_hundreds_of_rows_of_a_bfloat16_model_are_folded_in_float32(method: object) -> None:
    """A sum in bfloat16 stands still once it is 256 times its terms: the map would be off by half or more."""
    module = small_cnn().eval()
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = explain(module, x, method, target=3, score=Score.LOGIT)
    half = explain(small_cnn().eval().bfloat16(), x, method, target=3, score=Score.LOGIT)
    # The model's own type has eight bits: a few percent of a single gradient, and less of a sum of hundreds.
    assert np.linalg.norm(half - exact) <= 0.1 * np.linalg.norm(exact)


class Constantly(nn.Module):
    """Returns the same logits for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + 0 * x.flatten(1).mean(1, keepdim=True)


def test_the_sum_of_a_thousand_equal_scores_is_a_thousand_of_them() -> None:
    """RISE of a constant score is that score times how often a pixel is shown, over how often it is expected to be."""
    x = torch.rand(1, 1, 16, 16)
    exact, half = (
        explain(module, x, RISE(masks=1000, cells=4), target=1, score=Score.LOGIT)
        for module in (Constantly(), Constantly().bfloat16())
    )
    np.testing.assert_allclose(
        half, exact, rtol=2e-3, atol=0
    )  # float32 sums; inputs and masks are rounded for the model
    assert abs(exact.mean() - 1) < 0.1


def test_a_baseline_beyond_the_models_type_is_the_callers_fault() -> None:
    from sidelight_server.errors import InvalidArgument

    for module, baseline in ((Linear().half(), 1e5), (Linear(), 1e39)):
        with pytest.raises(InvalidArgument, match="holds"):
            explain(module, torch.rand(1, 3, 4, 5), IntegratedGradients(baseline=Constant(baseline)))
