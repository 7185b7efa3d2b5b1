"""Laws that hold of methods on any model. In float64, where only the float32 of the answer rounds."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from sidelight_server import (
    RISE,
    Blurred,
    Channels,
    Constant,
    ExpectedGradients,
    Given,
    GradCAM,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    LayerGradientXActivation,
    Magnitude,
    MeanColor,
    Occlusion,
    Rule,
    Score,
    SmoothGrad,
    Statistic,
)
from torch import Tensor, nn

from support.engines import Explain, assert_close, explaining
from support.models import small_cnn
from support.tolerances import FLOAT32

CLASS = 3
SHAPE = (2, 12, 12)
REFINED = IntegratedGradients(0, Rule.TRAPEZOID, tolerance=0.1, max_rows=65)
METHODS = {
    "gradient": Gradient(),
    "gradient times input": Gradient(times_input=True),
    "squared gradient": Gradient(Magnitude.SQUARED),
    "guided backpropagation": GuidedBackpropagation(),
    "smoothgrad": SmoothGrad(6),
    "vargrad": SmoothGrad(6, statistic=Statistic.VARIANCE),
    "smoothgrad to a tolerance": SmoothGrad(0, tolerance=0.3, max_rows=41),
    "smoothgrad of integrated gradients": SmoothGrad(3, base=IntegratedGradients(4)),
    "integrated gradients": IntegratedGradients(9, baseline=MeanColor()),
    "integrated gradients to a tolerance": REFINED,
    "expected gradients": ExpectedGradients(9, noise_level=0.1),
    "grad-cam": GradCAM(keep_negative=True),
    "layer gradient times activation": LayerGradientXActivation("2"),
    "occlusion": Occlusion((4, 4), (2, 3), Blurred(1.0)),
    "rise": RISE(masks=30, cells=3),
}
RANDOM = ["smoothgrad", "vargrad", "smoothgrad of integrated gradients", "expected gradients", "rise"]


class Shifted(nn.Module):
    """A model with a constant added to all its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 5.0


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return small_cnn(2, size=12).double().eval()


@pytest.fixture(scope="module")
def explain(module: nn.Module) -> Iterator[Explain]:
    with explaining(module, input_size=SHAPE) as explain:
        yield explain


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def smooth_cnn() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Softplus(), nn.Conv2d(6, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, 5)
    ).double()


@pytest.mark.parametrize("base", ["gradient", "gradient times input", "guided backpropagation", "integrated gradients"])
@pytest.mark.parametrize("n", [1, 3])
def test_smoothgrad_without_noise_is_its_base(base: str, n: int, explain: Explain, x: Tensor) -> None:
    method = METHODS[base]
    assert_close(explain(x, SmoothGrad(n, noise_level=0.0, base=method)).maps, explain(x, method).maps)


@pytest.mark.parametrize("score", [Score.LOGIT, Score.PROBABILITY], ids=lambda score: score.value)
@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.value)
def test_integrated_gradients_add_up_to_the_rise_of_the_score_but_for_the_error_they_report(
    score: Score, rule: Rule, x: Tensor
) -> None:
    module = smooth_cnn()
    with explaining(module) as explain, torch.no_grad():
        answer = explain(x, IntegratedGradients(50, rule, Constant(0.2)), target=CLASS, score=score)
        scores = module(torch.cat([x, torch.full_like(x[:1], 0.2)]))
    scores = (scores if score is Score.LOGIT else scores.softmax(dim=1))[:, CLASS]
    rise = (scores[:-1] - scores[-1]).numpy()
    sums, sizes = answer.maps.sum(axis=(1, 2, 3), dtype=np.float64), np.abs(answer.maps).sum(axis=(1, 2, 3))
    convergence = [each.convergence for each in answer.explanations]
    # Gauss–Legendre is exact for what is analytic; rules of second order miss by about a thousandth.
    assert np.abs(sums - rise).max() <= (1e-6 if rule is Rule.GAUSS_LEGENDRE else 2e-3) * sizes.max()
    # Each of 288 elements came as float32.
    absolute, relative = (
        [getattr(each, name) for each in convergence]
        for name in (
            "completeness_error",
            "relative_completeness_error",
        )
    )
    np.testing.assert_allclose(absolute, np.abs(sums - rise), rtol=0, atol=FLOAT32 * sizes.max())
    np.testing.assert_allclose(relative, np.array(absolute) / np.abs(rise), rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 6])
def test_of_a_net_without_biases_gradient_times_input_is_integrated_gradients(steps: int, x: Tensor) -> None:
    torch.manual_seed(7)
    module = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 9, 5, bias=False),
    ).double()
    with explaining(module) as explain:
        product = explain(x, Gradient(times_input=True), target=CLASS)
        integral = explain(x, IntegratedGradients(steps), target=CLASS)
    assert_close(integral.maps, product.maps)
    # The gradient is the same on all of a ray. (A trapezoid would also look at 0, where a rectifier has none.)
    assert max(each.convergence.relative_completeness_error for each in integral.explanations) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_permuting_a_batch_permutes_its_maps(method: str, explain: Explain, x: Tensor) -> None:
    order = [2, 0, 3, 1]
    whole, permuted = (explain(each, METHODS[method], score=Score.PROBABILITY) for each in (x, x[order]))
    assert_close(permuted.maps, whole.maps[order])
    for place, each in enumerate(permuted.explanations):
        assert each.targets[0].index == whole.explanations[order[place]].targets[0].index


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_added_to_all_logits_changes_no_map_of_a_probability(
    method: str, module: nn.Module, explain: Explain, x: Tensor
) -> None:
    chosen = METHODS[method]
    if isinstance(chosen, LayerGradientXActivation):
        chosen = replace(chosen, layer=f"inner.{chosen.layer}")
    with explaining(Shifted(module), input_size=SHAPE) as shifted:
        maps = shifted(x, chosen, score=Score.PROBABILITY).maps
    assert_close(maps, explain(x, METHODS[method], score=Score.PROBABILITY).maps)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_example_twice_in_a_batch_has_the_same_map(method: str, explain: Explain, x: Tensor) -> None:
    """So every example of a batch has the same draws, and rows before it do not change them."""
    maps = explain(x[[0, 1, 0, 2, 0]], METHODS[method], target=CLASS).maps
    assert_close(maps[[2, 4]], maps[[0, 0]])
    assert_close(explain(x[:1], METHODS[method], target=CLASS).maps, maps[:1])
    assert np.abs(maps[1] - maps[0]).max() > 0.01 * np.abs(maps).max()


@pytest.mark.parametrize("method", RANDOM)
def test_a_seed_decides_a_map(method: str, explain: Explain, x: Tensor) -> None:
    first, again, other = (
        explain(x, replace(METHODS[method], seed=seed), target=CLASS, score=Score.PROBABILITY).maps
        for seed in (5, 5, 6)
    )
    assert_close(again, first)
    assert np.abs(other - first).max() > 0.01 * np.abs(first).max()


@pytest.mark.parametrize("method", ["smoothgrad", "vargrad", "smoothgrad to a tolerance"])
def test_relative_noise_is_a_share_of_the_examples_range(method: str, explain: Explain, x: Tensor) -> None:
    relative = replace(METHODS[method], noise_level=0.2)
    for example in x:
        range_ = float(example.max() - example.min())
        absolute = replace(relative, noise_level=0.2 * range_, absolute_noise=True)
        assert_close(explain(example[None], relative).maps, explain(example[None], absolute).maps)


@pytest.mark.parametrize("method", [IntegratedGradients(5), REFINED, Occlusion((4, 4))], ids=lambda each: each.name)
def test_an_example_that_is_its_own_baseline_has_an_empty_map(
    method: IntegratedGradients | Occlusion, explain: Explain, x: Tensor
) -> None:
    answer = explain(x, replace(method, baseline=Given(x.numpy())), target=CLASS)
    assert not answer.maps.any()
    if isinstance(method, IntegratedGradients):
        assert {each.convergence.completeness_error for each in answer.explanations} == {0.0}
        # Nothing rose: there is no share of it.
        assert {each.convergence.relative_completeness_error for each in answer.explanations} == {None}


def test_pixels_that_a_model_does_not_see_have_no_share_in_a_map(module: nn.Module, x: Tensor) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.cat([torch.zeros_like(x[..., :5]), x[..., 5:]], dim=3))

    with explaining(Masked(), input_size=SHAPE) as explain:
        for name in METHODS:
            # Those that look at a layer see by its receptive field, RISE and wide windows by their neighbors.
            if name not in ("grad-cam", "layer gradient times activation", "occlusion", "rise"):
                assert not explain(x, METHODS[name]).maps[..., :5].any(), name
        assert not explain(x, Occlusion((4, 5))).maps[..., :5].any()


@pytest.mark.parametrize("statistic", [Statistic.MEAN_SQUARE, Statistic.VARIANCE], ids=lambda each: each.value)
def test_squares_and_variances_have_no_sign(statistic: Statistic, explain: Explain, x: Tensor) -> None:
    for channels in Channels:
        assert explain(x, SmoothGrad(5, statistic=statistic), channels=channels).maps.min() >= 0
