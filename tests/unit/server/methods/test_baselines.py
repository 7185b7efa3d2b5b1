"""Baselines, tested with a model whose logit is the sum of its input: its integrated gradients are x − baseline."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from sidelight_server import (
    Black,
    Blurred,
    Channels,
    Constant,
    Engine,
    Given,
    IntegratedGradients,
    MeanColor,
    ModelSpec,
    Occlusion,
    Settings,
    SmoothGrad,
)
from sidelight_server.errors import FailedPrecondition, InvalidArgument
from sidelight_server.methods import random
from torch import Tensor, nn

from support.engines import Explain, ask, assert_close, explaining

SHAPE = (3, 7, 10)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


class Sum(nn.Module):
    """Two logits: the sum of the input, and 0."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).sum(dim=1, keepdim=True) * self.scale
        return torch.cat([total, torch.zeros_like(total)], dim=1)


@pytest.fixture(scope="module")
def explain() -> Iterator[Explain]:
    with explaining(Sum(), input_size=SHAPE, mean=MEAN, std=STD) as explain:
        yield explain


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def blurred(x: Tensor, sigma: float) -> np.ndarray:
    """Return each channel of each example under SciPy's filter, which ends at four standard deviations too."""
    return np.stack([[gaussian_filter(each, sigma, mode="nearest", truncate=4.0) for each in one] for one in x.numpy()])


def constant(values: list[float]) -> np.ndarray:
    return np.broadcast_to(np.array(values)[:, None, None], (3, *SHAPE))


BASELINES = {
    "zero": (Constant(), lambda x: np.zeros_like(x)),
    "constant": (Constant(-1.25), lambda x: np.full_like(x, -1.25)),
    "black": (Black(), lambda x: constant([-m / s for m, s in zip(MEAN, STD, strict=True)])),
    "mean color": (MeanColor(), lambda x: np.broadcast_to(x.numpy().mean(axis=(2, 3), keepdims=True), x.shape)),
    "hardly blurred": (Blurred(0.1), lambda x: blurred(x, 0.1)),
    "blurred": (Blurred(1.5), lambda x: blurred(x, 1.5)),
    "blurred to about its size": (Blurred(8.0), lambda x: blurred(x, 8.0)),
    "blurred far beyond its size": (Blurred(40.0), lambda x: blurred(x, 40.0)),
}


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_path_begins_at_the_baseline(baseline: str, explain: Explain, x: Tensor) -> None:
    chosen, expected = BASELINES[baseline]
    maps = explain(x, IntegratedGradients(3, baseline=chosen), target=0).maps
    # Differences from a blur of 0.1 pixels, which moves nothing, are zero.
    np.testing.assert_allclose(maps, x.numpy() - expected(x), rtol=0, atol=1e-7 * float(x.abs().max()))


@pytest.mark.parametrize("baseline", BASELINES)
def test_a_window_is_filled_with_the_baseline(baseline: str, explain: Explain, x: Tensor) -> None:
    chosen, expected = BASELINES[baseline]
    maps = explain(x, Occlusion((1, 1), baseline=chosen), target=0, channels=Channels.SUM).maps
    # What a window hides is the difference of two sums of 210 elements: float64 keeps 1e-15 of them.
    np.testing.assert_allclose(maps, (x.numpy() - expected(x)).sum(axis=1), rtol=0, atol=1e-6)


def test_a_given_baseline_is_one_for_all_examples_or_one_for_each(explain: Explain, x: Tensor) -> None:
    other = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2)).numpy()  # its own type is float32
    for array in (other[0], other):
        assert_close(explain(x, IntegratedGradients(3, baseline=Given(array)), target=0).maps, x.numpy() - array)
        maps = explain(x, Occlusion((1, 1), baseline=Given(array)), target=0, channels=Channels.SUM).maps
        assert_close(maps, (x.numpy() - array).sum(axis=1))


def test_a_baseline_made_of_the_example_is_made_of_its_noisy_copy(explain: Explain, x: Tensor) -> None:
    copies = [x + 0.5 * random.noise(x[0], 0, "smoothgrad", k) for k in range(4)]
    expected = torch.stack([each - each.mean(dim=(2, 3), keepdim=True) for each in copies]).mean(dim=0)
    base = IntegratedGradients(2, baseline=MeanColor())
    assert_close(explain(x, SmoothGrad(4, 0.5, absolute_noise=True, base=base), target=0).maps, expected)


def test_black_is_what_a_black_picture_becomes(explain: Explain) -> None:
    black = np.zeros((1, *SHAPE[1:], 3), np.uint8)
    assert not explain(black, IntegratedGradients(3, baseline=Black()), target=0).maps.any()
    assert explain(black, IntegratedGradients(3), target=0).maps.any()  # the constant 0 is not black


@pytest.mark.parametrize("method", [IntegratedGradients(3, baseline=Black()), Occlusion((2, 2), baseline=Black())])
def test_without_preprocessing_nothing_is_black(method: IntegratedGradients | Occlusion, x: Tensor) -> None:
    with Engine([ModelSpec(Sum())], Settings(device="cpu")) as engine:
        failures = ask(engine, x, method=method).failures
    assert [each.code for each in failures] == [FailedPrecondition.code] * 3
    assert "method.baseline.black" in failures[0].message


@pytest.mark.parametrize("shape", [(3, 7, 9), (2, 3, 7, 10), (1, 7, 10), (7, 10), (3, 1, 7, 10)], ids=str)
@pytest.mark.parametrize("kind", [IntegratedGradients, Occlusion], ids=lambda kind: kind.name)
def test_a_baseline_of_another_shape_is_refused(
    kind: type[IntegratedGradients | Occlusion], shape: tuple[int, ...], explain: Explain, x: Tensor
) -> None:
    given = Given(np.zeros(shape))
    method = IntegratedGradients(3, baseline=given) if kind is IntegratedGradients else Occlusion((2, 2), None, given)
    with pytest.raises(InvalidArgument) as refused:
        explain(x, method)
    assert refused.value.message == (
        f"method.baseline.tensor: shape {list(shape)}, expected [3, 7, 10] or [3, 3, 7, 10]"
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_baseline_that_is_not_finite_is_refused(bad: float) -> None:
    for make in (lambda: Constant(bad), lambda: Given(np.array([[[bad]]]))):
        with pytest.raises(InvalidArgument, match=r"method\.baseline\.(constant|tensor): .*finite"):
            make()


def test_a_blur_that_is_wider_than_the_picture_by_far_is_refused() -> None:
    """Otherwise its filter could occupy the device's thread for any time."""
    Blurred(4.0 * 12).check((3, 10, 12), 1)
    with pytest.raises(InvalidArgument, match=r"blurred\.sigma: got 250000, expected at most 48"):
        IntegratedGradients(baseline=Blurred(250_000)).check((3, 10, 12), 1)


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")], ids=str)
def test_a_blur_needs_a_positive_sigma(sigma: float) -> None:
    with pytest.raises(InvalidArgument, match=r"method\.baseline\.blurred\.sigma: got .*, expected a positive number"):
        Blurred(sigma)
