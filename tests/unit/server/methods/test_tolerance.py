"""Methods with a tolerance: the reported errors equal those computed independently. In float64."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sidelight_server import Gradient, IntegratedGradients, MeanColor, Rule, Score, SmoothGrad, Statistic
from sidelight_server.methods import random
from torch import Tensor, nn

from support.engines import Explain, assert_close, explaining
from support.models import small_cnn

CLASS, SEED = 3, 2
SHAPE = (2, 12, 12)
LEAST = 8  # intervals, before which a change of the map says little
BLOCK = 8  # draws between two looks at the standard error
LEAST_DRAWS = 16  # before which a standard error says little
# What is compared is the change of a float32 map: 6e-8 of the map, over a change of at least a thousandth of it.
CHANGE = 2e-4


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return small_cnn(2, size=12).double().eval()


@pytest.fixture(scope="module")
def explain(module: nn.Module) -> Iterator[Explain]:
    with explaining(module, input_size=SHAPE) as explain:
        yield explain


@pytest.fixture
def x() -> Tensor:
    """Examples whose paths are unequally curved, so that they stop at unequal numbers of rows."""
    x = torch.randn(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    return x * torch.tensor([0.3, 1.0, 3.0, 10.0, 30.0], dtype=torch.float64).view(-1, 1, 1, 1)


def refined(tolerance: float, max_rows: int = 300) -> IntegratedGradients:
    return IntegratedGradients(0, Rule.TRAPEZOID, MeanColor(), tolerance, max_rows)


def smoothed(tolerance: float, max_rows: int = 300) -> SmoothGrad:
    return SmoothGrad(0, noise_level=0.2, seed=SEED, tolerance=tolerance, max_rows=max_rows)


def intervals(rows: int) -> int:
    """Return the number of intervals of a trapezoid that was halved again and again."""
    assert rows - 1 > 0
    assert (rows - 1) & (rows - 2) == 0  # rows = 2^k + 1
    return rows - 1


def trapezoid(explain: Explain, x: Tensor, n: int) -> np.ndarray:
    """Return the maps, in float64, of a trapezoid of n intervals."""
    method = IntegratedGradients(n + 1, Rule.TRAPEZOID, MeanColor())
    return explain(x, method, target=CLASS, score=Score.PROBABILITY).maps.astype(np.float64)


@pytest.mark.parametrize("tolerance", [0.3, 0.05, 0.01])
def test_a_path_is_halved_until_that_changes_a_map_by_no_more_than_the_tolerance(
    tolerance: float, explain: Explain, x: Tensor
) -> None:
    answer = explain(x, refined(tolerance), target=CLASS, score=Score.PROBABILITY)
    for place, each in enumerate(answer.explanations):
        n = intervals(each.convergence.rows)
        before, after = (trapezoid(explain, x[place : place + 1], steps)[0] for steps in (n // 2, n))
        # Every gradient of the coarser rules was used again: the map is the finest rule's.
        assert_close(answer.maps[place], after)
        change = np.linalg.norm(after - before) / np.linalg.norm(after)
        assert each.convergence.error == pytest.approx(change, rel=CHANGE)
        assert change <= tolerance or 2 * n + 1 > 300
        assert n >= LEAST
        if n > LEAST:  # one refinement fewer would not have been enough
            coarsest = trapezoid(explain, x[place : place + 1], n // 4)[0]
            assert np.linalg.norm(before - coarsest) / np.linalg.norm(before) > tolerance


def integral(module: nn.Module, x: Tensor, n: int) -> np.ndarray:
    """Return the map of one example, [C, H, W], by a trapezoid of n intervals and autograd."""
    mean = x.mean(dim=(1, 2), keepdim=True)
    nodes = torch.linspace(0, 1, n + 1, dtype=x.dtype).view(-1, 1, 1, 1)
    points = (mean + nodes * (x - mean)).requires_grad_()  # [n + 1, C, H, W]
    (gradients,) = torch.autograd.grad(module(points).softmax(dim=1)[:, CLASS].sum(), points)
    return np.asarray((x - mean) * torch.trapezoid(gradients, dx=1 / n, dim=0))


def test_a_map_within_a_tolerance_is_within_it_of_the_integral(module: nn.Module, explain: Explain, x: Tensor) -> None:
    """The last change bounds the distance to the limit for a rule of second order: it is about three times as large."""
    maps = explain(x, refined(0.05, max_rows=1025), target=CLASS, score=Score.PROBABILITY).maps
    exact = np.stack([integral(module, each, 2048) for each in x])
    misses = np.linalg.norm((maps - exact).reshape(5, -1), axis=1) / np.linalg.norm(exact.reshape(5, -1), axis=1)
    assert misses.max() <= 0.05


@pytest.mark.parametrize(("max_rows", "rows"), [(3, 3), (4, 3), (5, 5), (16, 9), (17, 17), (300, 257)])
def test_no_path_takes_more_rows_than_are_allowed(max_rows: int, rows: int, explain: Explain, x: Tensor) -> None:
    for each in explain(x, refined(1e-9, max_rows), target=CLASS).explanations:
        assert each.convergence.rows == rows
        assert each.convergence.error > 1e-9


@pytest.mark.parametrize("method", [refined(0.05), smoothed(0.2)], ids=lambda method: method.name)
def test_an_example_stops_where_it_stops_alone(
    method: IntegratedGradients | SmoothGrad, explain: Explain, x: Tensor
) -> None:
    together = explain(x, method, target=CLASS, score=Score.PROBABILITY)
    assert len({each.convergence.rows for each in together.explanations}) > 1
    for place, each in enumerate(together.explanations):
        alone = explain(x[place : place + 1], method, target=CLASS, score=Score.PROBABILITY)
        assert alone.explanations[0].convergence.rows == each.convergence.rows
        assert alone.explanations[0].convergence.error == pytest.approx(each.convergence.error, rel=1e-9)
        assert_close(alone.maps[0], together.maps[place])


def gradients_at_draws(module: nn.Module, x: Tensor, n: int, *, seed: int = SEED) -> Tensor:
    """Return the gradients of a class's logit at the first n noisy copies of one example, [n, C, H, W]."""
    spread = 0.2 * (x.max() - x.min())
    points = torch.stack([x + spread * random.noise(x, seed, "smoothgrad", k) for k in range(n)]).requires_grad_()
    return torch.autograd.grad(module(points)[:, CLASS].sum(), points)[0]


def standard_error(gradients: Tensor) -> float:
    """Return the standard error of a mean, in L2 over that mean's."""
    n = len(gradients)
    return float((gradients.var(dim=0, correction=1).sum() / n).sqrt() / gradients.mean(dim=0).norm())


@pytest.mark.parametrize("tolerance", [0.6, 0.3, 0.12])
def test_noise_is_drawn_until_the_standard_error_is_no_more_than_the_tolerance(
    tolerance: float, module: nn.Module, explain: Explain, x: Tensor
) -> None:
    answer = explain(x, smoothed(tolerance), target=CLASS)
    for place, each in enumerate(answer.explanations):
        n = each.convergence.rows - 1  # the first row looks at the example itself
        gradients = gradients_at_draws(module, x[place], n)
        assert_close(answer.maps[place], gradients.mean(dim=0))
        assert each.convergence.error == pytest.approx(standard_error(gradients), rel=1e-9)
        assert n == 299 or (n % BLOCK == 0 and each.convergence.error <= tolerance)
        assert n >= LEAST_DRAWS
        if n > LEAST_DRAWS:
            last = (n - 1) // BLOCK * BLOCK
            assert standard_error(gradients[:last]) > tolerance  # eight draws fewer would not have been enough


@pytest.mark.parametrize(("max_rows", "rows"), [(2, 2), (8, 8), (9, 9), (30, 30)])
def test_noise_takes_no_more_rows_than_are_allowed(max_rows: int, rows: int, explain: Explain, x: Tensor) -> None:
    for each in explain(x, smoothed(1e-9, max_rows), target=CLASS).explanations:
        assert each.convergence.rows == rows


def test_noise_over_a_path_takes_no_more_rows_than_are_allowed(explain: Explain, x: Tensor) -> None:
    method = SmoothGrad(0, tolerance=1e-9, max_rows=30, base=IntegratedGradients(5))  # 7 rows a draw
    assert {each.convergence.rows for each in explain(x, method).explanations} == {1 + 4 * 7}


@pytest.mark.parametrize("statistic", Statistic, ids=lambda statistic: statistic.value)
def test_a_fixed_number_of_draws_reports_its_standard_error_too(
    statistic: Statistic, module: nn.Module, explain: Explain, x: Tensor
) -> None:
    answer = explain(x, SmoothGrad(13, noise_level=0.2, seed=SEED, statistic=statistic), target=CLASS)
    for place, each in enumerate(answer.explanations):
        assert each.convergence.rows == 14
        expected = standard_error(gradients_at_draws(module, x[place], 13))
        assert each.convergence.error == pytest.approx(expected, rel=1e-9)


def test_more_draws_bring_a_map_nearer_to_that_of_many(module: nn.Module, explain: Explain, x: Tensor) -> None:
    """The reported error is right: the distance to the mean of very many draws is of that size."""
    many = np.stack([gradients_at_draws(module, each, 2000, seed=SEED + 1).mean(dim=0).numpy().ravel() for each in x])
    for n in (16, 64):
        answer = explain(x, SmoothGrad(n, noise_level=0.2, seed=SEED), target=CLASS)
        misses = np.linalg.norm(answer.maps.reshape(5, -1) - many, axis=1) / np.linalg.norm(many, axis=1)
        errors = np.array([each.convergence.error for each in answer.explanations])
        # 288 elements that are related: chance moves the ratio of both by some tenths, not by half of it.
        assert (misses < 1.5 * errors).all()
        assert (misses > 0.5 * errors).all()


def test_a_method_of_one_row_has_nothing_to_report(explain: Explain, x: Tensor) -> None:
    assert {each.convergence for each in explain(x, Gradient()).explanations} == {None}


class Kink(nn.Module):
    """A logit that rises by `height` within a short part of a path, between two nodes of a coarse grid."""

    def __init__(self, *, place: float, width: float, height: float) -> None:
        super().__init__()
        self.place, self.width, self.height = place, width, height

    def forward(self, x: Tensor) -> Tensor:
        t = x.mean(dim=(1, 2, 3))
        step = ((t - self.place).clamp(0, self.width) / self.width) * self.height
        return torch.stack([step + 0.1 * t, torch.zeros_like(t)], dim=1)


@pytest.mark.parametrize("width", [0.004, 0.2])
@pytest.mark.parametrize("place", [0.05, 0.23, 0.52, 0.8])
def test_a_kink_that_is_narrower_than_the_grid_is_found_or_reported(place: float, width: float) -> None:
    kink = Kink(place=place, width=width, height=1.0)
    ones = torch.ones(1, 1, 4, 4)
    with explaining(kink, input_size=(1, 4, 4), output_kind="logits") as explain:
        answer = explain(ones, IntegratedGradients(0, Rule.TRAPEZOID, tolerance=0.05), target=0, score=Score.LOGIT)
    (explanation,) = answer.explanations
    # The integral in closed form: the rise of the logit, in equal parts.
    missing = abs(answer.maps.sum() - 1.1) / 1.1
    assert missing <= 0.05 or explanation.convergence.is_met is False
    assert explanation.convergence.is_met or explanation.convergence.rows == 257
    assert explanation.convergence.is_met is (width == 0.2)  # which 257 nodes resolve
    assert explanation.convergence.tolerance == 0.05


@pytest.mark.parametrize("method", [refined(0.05), smoothed(0.4)], ids=lambda method: method.name)
def test_an_answer_reports_whether_its_tolerance_was_met(
    method: IntegratedGradients | SmoothGrad, explain: Explain, x: Tensor
) -> None:
    met = [each.convergence for each in explain(x[:2], method, target=CLASS, score=Score.PROBABILITY).explanations]
    assert all(each.is_met and each.error <= each.tolerance == method.tolerance for each in met)
    short = dataclasses.replace(method, tolerance=1e-9, max_rows=17)
    for each in explain(x[:2], short, target=CLASS, score=Score.PROBABILITY).explanations:
        assert each.convergence.is_met is False


def test_without_a_tolerance_none_is_met_or_missed(explain: Explain, x: Tensor) -> None:
    (each,) = explain(x[:1], SmoothGrad(8)).explanations
    assert (each.convergence.tolerance, each.convergence.is_met) == (None, None)
