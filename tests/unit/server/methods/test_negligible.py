"""Maps of only rounding errors are marked as negligible, and small correct ones are not."""

import pytest
import torch
from sidelight_server import (
    RISE,
    Answer,
    Channels,
    GradCAM,
    Gradient,
    IntegratedGradients,
    LayerGradientXActivation,
    Occlusion,
    Score,
    SmoothGrad,
    TopK,
)
from sidelight_server.methods import Method
from torch import Tensor, nn

from support.engines import explaining
from support.models import small_cnn

SIZE = (3, 16, 16)


class Attention(nn.Module):
    """One block of attention. A vector that is added to every key changes no weight, so a key's mean gradient is 0."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.key, self.query, self.value = (nn.Conv2d(16, 16, 1) for _ in range(3))
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x).relu()
        key, query, value = (each(h).flatten(2) for each in (self.key, self.query, self.value))  # [n, c, T]
        weights = (query.transpose(1, 2) @ key / 4).softmax(dim=2)
        return self.out((value @ weights.transpose(1, 2)).tanh().mean(dim=2))


def flags(answer: Answer) -> list[bool]:
    return [one.negligible for each in answer.explanations for one in each.targets]


def x(n: int = 3) -> Tensor:
    return torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keeps", [True, False])
def test_grad_cam_of_a_layer_whose_gradients_cancel_by_symmetry_is_nothing(seed: int, *, keeps: bool) -> None:
    with explaining(Attention(seed), input_size=SIZE) as explain:
        for layer in ("key", "query", "value", "stem"):
            assert set(flags(explain(x(), GradCAM(layer, keep_negative=keeps)))) == {layer == "key"}
        assert flags(explain(x(), GradCAM("key"), target=TopK(2))) == [True] * 6


METHODS: dict[str, Method] = {
    "gradient": Gradient(),
    "smoothgrad": SmoothGrad(4),
    "integrated gradients": IntegratedGradients(4),
    "grad-cam": GradCAM(),
    "layer gradient times activation": LayerGradientXActivation(),
    "occlusion": Occlusion((8, 8)),
    "rise": RISE(masks=6, cells=2),
}


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = small_cnn(size=16), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.factor


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [Channels.NONE, Channels.MAX_ABS], ids=lambda each: each.value)
def test_no_map_is_negligible_because_of_its_scale(method: str, channels: Channels) -> None:
    for factor in (1.0, 1e-6, 1e-18):
        with explaining(Scaled(factor).eval(), input_size=SIZE) as explain:
            assert not any(flags(explain(x(), METHODS[method], channels=channels)))


@pytest.mark.parametrize("method", METHODS)
def test_a_score_that_does_not_depend_on_the_input_has_a_negligible_map(method: str) -> None:
    with explaining(Scaled(0.0).eval(), input_size=SIZE, output_kind="logits") as explain:
        assert all(flags(explain(x(), METHODS[method])))


def test_a_layer_without_evidence_for_a_class_has_a_map_of_zeros() -> None:
    """Grad-CAM's ReLU then gives zero everywhere, and the answer reports that the map is negligible."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        module[4].weight.copy_(torch.tensor([[1.0], [-1.0]]).expand(2, 4))
    with explaining(module, input_size=SIZE) as explain:
        answer = explain(x(), GradCAM("1"), target=1)
    assert not answer.maps.any()
    assert not any(flags(answer))


@pytest.mark.parametrize("score", [Score.PROBABILITY, Score.LOGIT], ids=lambda score: score.value)
def test_occlusion_of_a_sure_prediction_is_something(score: Score) -> None:
    module = Scaled(1.0).eval()
    with torch.no_grad():
        first, second = module(x(1))[0].topk(2).values
        module.factor = float(25 / (first - second))
    with explaining(module, input_size=SIZE) as explain:
        assert not any(flags(explain(x(1), Occlusion((4, 4)), score=score)))
