"""Methods on models whose maps can be written down: linear logits, and their softmax. In float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.integrate import quad_vec
from sidelight_server import (
    Constant,
    ExpectedGradients,
    Given,
    Gradient,
    IntegratedGradients,
    Rule,
    Score,
    SmoothGrad,
    Statistic,
)
from sidelight_server.methods import random
from torch import Tensor

from support.engines import Explain, assert_close, explaining
from support.models import Linear

CLASS, SEED = 4, 3
SHAPE = (3, 4, 5)


@pytest.fixture(scope="module")
def module() -> Linear:
    return Linear(shape=SHAPE).double()


@pytest.fixture(scope="module")
def explain(module: Linear) -> Iterator[Explain]:
    with explaining(module, input_size=SHAPE) as explain:
        yield explain


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def others() -> Tensor:
    return torch.randn(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def weight(module: Linear) -> Tensor:
    """The gradient of the class's logit, wherever it is taken: [C, H, W]."""
    return module.linear.weight.detach()[CLASS].view(SHAPE)


def exact_integral(module: Linear, x: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return the integrated gradients of a class's probability by adaptive quadrature, [C, H, W]."""
    weights, bias = (each.detach().numpy() for each in (module.linear.weight, module.linear.bias))
    start, end = (weights @ each.ravel() + bias for each in (baseline, x))

    def gradient(t: float) -> np.ndarray:
        exponential = np.exp(start + t * (end - start) - max(start.max(), end.max()))
        p = exponential / exponential.sum()
        return p[CLASS] * (weights[CLASS] - p @ weights)

    mean, _ = quad_vec(gradient, 0, 1, epsabs=1e-12, epsrel=1e-12)
    return mean.reshape(SHAPE) * (x - baseline)


@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.value)
def test_integrated_gradients_of_a_linear_softmax_approach_the_integral_in_their_order(
    rule: Rule, module: Linear, explain: Explain, x: Tensor, others: Tensor
) -> None:
    exact = np.stack([exact_integral(module, each.numpy(), others[0].numpy()) for each in x])

    def miss(steps: int) -> float:
        method = IntegratedGradients(steps, rule, Given(others[0].numpy()))
        maps = explain(x, method, target=CLASS, score=Score.PROBABILITY).maps
        return float(np.linalg.norm(maps - exact) / np.linalg.norm(exact))

    if rule is Rule.GAUSS_LEGENDRE:
        assert miss(50) < 1e-7  # all that float32 says
    else:  # of second order in the step: half of it leaves a quarter, but for terms of the fourth
        ends = 1 if rule is Rule.TRAPEZOID else 0
        assert miss(32 + ends) / miss(64 + ends) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.value)
@pytest.mark.parametrize("steps", [2, 7, 50])
@pytest.mark.parametrize("baseline", ["zero", "constant", "given"])
def test_integrated_gradients_of_a_linear_logit_are_weight_times_difference(
    rule: Rule, steps: int, baseline: str, explain: Explain, x: Tensor, others: Tensor, weight: Tensor
) -> None:
    chosen, value = {
        "zero": (Constant(), 0.0),
        "constant": (Constant(1.5), 1.5),
        "given": (Given(others[:4].numpy()), others[:4]),
    }[baseline]
    answer = explain(x, IntegratedGradients(steps, rule, chosen), target=CLASS)
    assert_close(answer.maps, weight * (x - value))
    # Weights in double precision add up to 1 within 1e-15: so does the map to the difference of logits of about 5.
    assert max(each.convergence.completeness_error for each in answer.explanations) < 1e-13


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_changes_no_gradient_of_a_linear_logit(noise: float, explain: Explain, x: Tensor, weight: Tensor) -> None:
    def folded(statistic: Statistic) -> np.ndarray:
        answer = explain(x, SmoothGrad(10, noise_level=noise, seed=SEED, statistic=statistic), target=CLASS)
        assert all(each.convergence.error < 1e-15 for each in answer.explanations)
        return answer.maps

    everywhere = weight.expand_as(x)
    assert_close(folded(Statistic.MEAN), everywhere)
    assert_close(folded(Statistic.MEAN_SQUARE), everywhere.square())
    # Not a bit of noise is left: ten equal gradients differ by nothing from a mean that rounds to within 1e-16.
    assert folded(Statistic.VARIANCE).max() < 1e-31


def test_smoothgrad_of_gradient_times_input_adds_the_weight_times_the_mean_noise(
    explain: Explain, x: Tensor, weight: Tensor
) -> None:
    noise = torch.stack([random.noise(x[0], SEED, "smoothgrad", k) for k in range(6)]).mean(dim=0)
    method = SmoothGrad(6, noise_level=0.3, absolute_noise=True, seed=SEED, base=Gradient(times_input=True))
    assert_close(explain(x, method, target=CLASS).maps, weight * (x + 0.3 * noise))


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_expected_gradients_of_a_linear_logit_are_weight_times_the_mean_difference(
    noise: float, explain: Explain, x: Tensor, others: Tensor, weight: Tensor
) -> None:
    n = 25
    baseline = torch.stack([others[random.integer(5, SEED, "baseline", k)] for k in range(n)]).mean(dim=0)
    moved = torch.stack([random.noise(x[0], SEED, "noise", k) for k in range(n)]).mean(dim=0)
    spread = noise * (x.amax(dim=(1, 2, 3)) - x.amin(dim=(1, 2, 3))).view(-1, 1, 1, 1)
    maps = explain(x, ExpectedGradients(n, others.numpy(), noise, SEED), target=CLASS).maps
    assert_close(maps, weight * (x + spread * moved - baseline))


def test_expected_gradients_without_baselines_begin_at_zero(explain: Explain, x: Tensor, weight: Tensor) -> None:
    assert_close(explain(x, ExpectedGradients(8), target=CLASS).maps, weight * x)


def test_every_baseline_is_drawn_about_equally_often() -> None:
    counts = np.bincount([random.integer(5, SEED, "baseline", k) for k in range(5000)], minlength=5)
    # Binomial with mean 1000 and deviation 28: five of them.
    assert abs(counts - 1000).max() < 5 * np.sqrt(5000 * 0.2 * 0.8)


def test_draws_are_standard_normal_and_uniform_and_of_no_relation_to_their_neighbors() -> None:
    like = torch.empty(3, 32, 32, dtype=torch.float64)
    noise = torch.stack([random.noise(like, seed, "smoothgrad", k) for seed in (0, 1) for k in range(8)]).flatten(1)
    n = noise.numel()
    assert abs(float(noise.mean())) < 5 / np.sqrt(n)
    assert abs(float(noise.var()) - 1) < 5 * np.sqrt(2 / n)
    related = (torch.corrcoef(noise) - torch.eye(16, dtype=torch.float64)).abs().max()
    assert float(related) < 5 / np.sqrt(noise.shape[1])  # seeds and points that are neighbors begin alike in torch
    places = np.array([random.uniform(0, "place", k) for k in range(2000)])
    assert abs(places.mean() - 0.5) < 5 / np.sqrt(12 * 2000)
    assert 0 <= places.min() < 0.01 < 0.99 < places.max() < 1
