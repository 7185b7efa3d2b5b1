"""Gradient methods compared with Captum's, in float64 and with the same random draws."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from captum.attr import GradientShap, GuidedBackprop, InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from sidelight_server import Constant, Given, Gradient, GuidedBackpropagation, Rule, Score, SmoothGrad, Statistic
from sidelight_server import ExpectedGradients as OurExpectedGradients
from sidelight_server import IntegratedGradients as OurIntegratedGradients
from sidelight_server.methods import random
from torch import Tensor, nn

from support.engines import Explain, assert_close, explaining
from support.models import small_cnn

# Captum holds a path's weights, and the nodes of its Riemann rules, in float32: 6e-8 of a gradient, and of the way.
CAPTUM_PATH = 1e-6
CLASS, SEED = 3, 11
SHAPE = (2, 12, 12)

SCORES: dict[Score, Callable[[Tensor], Tensor]] = {
    Score.LOGIT: lambda logits: logits,
    Score.PROBABILITY: lambda logits: logits.softmax(dim=1),
    Score.LOG_PROBABILITY: lambda logits: logits.log_softmax(dim=1),
}
RULES = {
    Rule.GAUSS_LEGENDRE: "gausslegendre",
    Rule.MIDPOINT: "riemann_middle",
    Rule.TRAPEZOID: "riemann_trapezoid",
}
NOISES = {
    Statistic.MEAN: "smoothgrad",
    Statistic.MEAN_SQUARE: "smoothgrad_sq",
    Statistic.VARIANCE: "vargrad",
}


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return small_cnn(SHAPE[0], size=SHAPE[1]).double().eval()


@pytest.fixture(scope="module")
def explain(module: nn.Module) -> Iterator[Explain]:
    with explaining(module, input_size=SHAPE) as explain:
        yield explain


@pytest.fixture
def x() -> Tensor:
    """Three examples of unlike ranges: their relative noise differs."""
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return x * torch.tensor([1.0, 0.3, 2.0], dtype=torch.float64).view(3, 1, 1, 1)


@pytest.fixture
def other() -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(6))


def named(each: object) -> str:
    return str(getattr(each, "value", each))


def spreads(x: Tensor, share: float) -> Tensor:
    """Return the standard deviation of each example's noise, [n, 1, 1, 1]."""
    return share * (x.amax(dim=(1, 2, 3)) - x.amin(dim=(1, 2, 3))).view(-1, 1, 1, 1)


def give_captum_our_noise(patch: pytest.MonkeyPatch, x: Tensor, *, spread: Tensor, kind: str, n: int) -> None:
    """Have Captum's noise tunnel, which has only one absolute noise level, use our draws, example by example."""
    ours = torch.stack([random.noise(x[0], SEED, kind, k) for k in range(n)])  # [n, C, H, W]
    noise = torch.cat([each * ours for each in spread.expand(len(x), 1, 1, 1)])
    patch.setattr(torch, "normal", lambda mean, spread: noise.reshape(spread.shape))


@pytest.mark.parametrize("score", SCORES, ids=named)
def test_the_gradient_is_captums(score: Score, module: nn.Module, explain: Explain, x: Tensor) -> None:
    expected = Saliency(lambda x: SCORES[score](module(x))).attribute(x.requires_grad_(), target=CLASS, abs=False)
    assert_close(explain(x, Gradient(), target=CLASS, score=score).maps, expected)


@pytest.mark.parametrize("score", SCORES, ids=named)
def test_gradient_times_input_is_captums(score: Score, module: nn.Module, explain: Explain, x: Tensor) -> None:
    expected = InputXGradient(lambda x: SCORES[score](module(x))).attribute(x.requires_grad_(), target=CLASS)
    assert_close(explain(x, Gradient(times_input=True), target=CLASS, score=score).maps, expected)


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("baseline", ["zero", "constant", "one for all", "one for each"])
@pytest.mark.parametrize("score", [Score.LOGIT, Score.PROBABILITY], ids=named)
def test_integrated_gradients_and_their_completeness_error_are_captums(
    rule: Rule, baseline: str, score: Score, module: nn.Module, explain: Explain, x: Tensor, other: Tensor
) -> None:
    ours, theirs = {
        "zero": (Constant(), 0.0),
        "constant": (Constant(-0.7), -0.7),
        "one for all": (Given(other[0].numpy()), other[:1]),
        "one for each": (Given(other[:3].numpy()), other[:3]),
    }[baseline]
    n = 13
    expected, delta = IntegratedGradients(lambda x: SCORES[score](module(x))).attribute(
        x, baselines=theirs, target=CLASS, n_steps=n, method=RULES[rule], return_convergence_delta=True
    )
    if rule is Rule.TRAPEZOID:  # Captum's weights are 1/n, half of that at the ends: they add up to (n − 1)/n
        rise = expected.sum(dim=(1, 2, 3)) - delta
        expected = expected * n / (n - 1)
        delta = expected.sum(dim=(1, 2, 3)) - rise
    answer = explain(x, OurIntegratedGradients(n, rule, ours), target=CLASS, score=score)
    assert_close(answer.maps, expected, share=CAPTUM_PATH)
    errors = [each.convergence.completeness_error for each in answer.explanations]
    # The sum of 288 numbers, each good to that share of the largest at worst.
    np.testing.assert_allclose(errors, delta.abs(), rtol=0, atol=CAPTUM_PATH * float(expected.abs().sum()))


@pytest.mark.parametrize("statistic", NOISES, ids=named)
@pytest.mark.parametrize("unit", ["share of the range", "absolute"])
@pytest.mark.parametrize("n", [1, 9])
def test_noise_over_the_gradient_is_captums(
    statistic: Statistic,
    unit: str,
    n: int,
    module: nn.Module,
    explain: Explain,
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absolute = unit == "absolute"
    spread = torch.full((1, 1, 1, 1), 0.2) if absolute else spreads(x, 0.2)
    with monkeypatch.context() as patch:
        give_captum_our_noise(patch, x, spread=spread, kind="smoothgrad", n=n)
        expected = NoiseTunnel(Saliency(module)).attribute(
            x, nt_type=NOISES[statistic], nt_samples=n, stdevs=0.2, abs=False, target=CLASS
        )
    method = SmoothGrad(n, noise_level=0.2, absolute_noise=absolute, seed=SEED, statistic=statistic)
    if n == 1 and statistic is Statistic.VARIANCE:
        assert not explain(x, method, target=CLASS).maps.any()
    else:
        assert_close(explain(x, method, target=CLASS).maps, expected)


@pytest.mark.parametrize("statistic", NOISES, ids=named)
def test_noise_over_integrated_gradients_is_captums(
    statistic: Statistic,
    module: nn.Module,
    explain: Explain,
    x: Tensor,
    other: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        give_captum_our_noise(patch, x, spread=spreads(x, 0.1), kind="smoothgrad", n=6)
        expected = NoiseTunnel(IntegratedGradients(module)).attribute(
            x, nt_type=NOISES[statistic], nt_samples=6, n_steps=7, baselines=other[:3], stdevs=0.1, target=CLASS
        )
    base = OurIntegratedGradients(7, baseline=Given(other[:3].numpy()))
    answer = explain(x, SmoothGrad(6, noise_level=0.1, seed=SEED, statistic=statistic, base=base), target=CLASS)
    assert_close(answer.maps, expected, share=CAPTUM_PATH)
    assert [each.convergence.rows for each in answer.explanations] == [1 + 6 * (7 + 2)] * 3


@pytest.mark.parametrize("noise", [0.0, 0.1], ids=["no noise", "noise"])
@pytest.mark.parametrize("n_baselines", [1, 4])
def test_expected_gradients_are_captums_gradient_shap(
    noise: float,
    n_baselines: int,
    module: nn.Module,
    explain: Explain,
    x: Tensor,
    other: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n, baselines = 10, other[:n_baselines]
    chosen = [random.integer(n_baselines, SEED, "baseline", k) for k in range(n)]
    places = [random.uniform(SEED, "place", k) for k in range(n)]
    with monkeypatch.context() as patch:
        give_captum_our_noise(patch, x, spread=spreads(x, noise), kind="noise", n=n)
        patch.setattr(np.random, "choice", lambda _, size: np.array(chosen * (size // n)))
        patch.setattr(np.random, "uniform", lambda low, high, size: np.array(places * (size // n)))
        expected = GradientShap(module).attribute(x, baselines, n_samples=n, stdevs=noise, target=CLASS)
    method = OurExpectedGradients(n, baselines.numpy(), noise_level=noise, seed=SEED)
    assert_close(explain(x, method, target=CLASS).maps, expected)


class Plain(nn.Module):
    """Rectifiers as modules, which Captum's hooks find."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 8, 3)
        self.one, self.two, self.three = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.middle, self.last = nn.Linear(8 * 8 * 8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.second(self.one(self.first(x))))
        return self.last(self.three(self.middle(x.flatten(1))))


class Functional(Plain):
    """The same weights, with rectifiers that are functions, methods, and in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.first(x), inplace=True)
        x = self.second(x).relu_()
        return self.last(torch.relu(self.middle(x.flatten(1))))


captum_hooks = pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")


@captum_hooks
@pytest.mark.parametrize("net", [Plain, Functional], ids=["modules", "functions"])
def test_guided_backpropagation_is_captums(net: type[nn.Module], x: Tensor) -> None:
    expected = GuidedBackprop(Plain().double()).attribute(x.requires_grad_(), target=CLASS)
    with explaining(net().double()) as explain:
        assert_close(explain(x, GuidedBackpropagation(), target=CLASS).maps, expected)
        plain = explain(x, Gradient(), target=CLASS).maps
    assert np.abs(plain - expected.detach().numpy()).max() > 0.1 * np.abs(plain).max()  # otherwise no layer was guided


@captum_hooks
def test_noise_over_guided_backpropagation_is_captums(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        give_captum_our_noise(patch, x, spread=spreads(x, 0.2), kind="smoothgrad", n=4)
        expected = NoiseTunnel(GuidedBackprop(Plain().double())).attribute(x, nt_samples=4, stdevs=0.2, target=CLASS)
    with explaining(Plain().double()) as explain:
        method = SmoothGrad(4, noise_level=0.2, seed=SEED, base=GuidedBackpropagation())
        assert_close(explain(x, method, target=CLASS).maps, expected)
