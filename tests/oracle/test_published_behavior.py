"""Properties of maps that papers report, on scikit-learn's digits with a small CNN that is trained here."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sidelight_server import (
    RISE,
    Channels,
    ExpectedGradients,
    GradCAM,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    LayerGradientXActivation,
    Magnitude,
    Occlusion,
    Rule,
    Score,
    SmoothGrad,
    Statistic,
)
from sidelight_server.methods import Method
from sklearn.datasets import load_digits
from torch import Tensor, nn

from support.engines import Explain, explaining

SHAPE = (1, 8, 8)
N_TRAINED, N_EXPLAINED, N_RANDOM, AT_ONCE = 1300, 50, 5, 2
LAYERS = ("10", "8", "5", "2", "0")  # those with weights, from the top

METHODS: dict[str, Method] = {
    "gradient": Gradient(),
    "gradient times input": Gradient(times_input=True),
    "guided backpropagation": GuidedBackpropagation(),
    "smoothgrad": SmoothGrad(16),
    "smoothgrad squared": SmoothGrad(16, statistic=Statistic.MEAN_SQUARE),
    "vargrad": SmoothGrad(16, statistic=Statistic.VARIANCE),
    "integrated gradients": IntegratedGradients(25),
    "integrated gradients to a tolerance": IntegratedGradients(0, Rule.TRAPEZOID, tolerance=0.05),
    "expected gradients": ExpectedGradients(25),
    # At the last layer of 8 × 8 pixels: those after it have 4 × 4, too coarse to rank the pixels of a digit.
    "grad-cam": GradCAM("3"),
    "layer gradient times activation": LayerGradientXActivation("3"),
    "occlusion": Occlusion((2, 2), (1, 1)),
    "rise": RISE(masks=120, cells=4),
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: nothing here is large enough for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Pictures, [n, 1, 8, 8] in 0…1, and their classes."""
    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    pictures = torch.from_numpy(loaded.images[order]).float()[:, None] / 16
    return pictures, torch.from_numpy(loaded.target[order])


@pytest.fixture(scope="module")
def module(digits: tuple[Tensor, Tensor]) -> nn.Sequential:
    torch.manual_seed(2)
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    pictures, classes = (each[:N_TRAINED] for each in digits)
    optimiser = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(15):
        for batch in torch.randperm(N_TRAINED).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(pictures[batch]), classes[batch], label_smoothing=0.1).backward()
            optimiser.step()
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def explain(module: nn.Module) -> Iterator[Explain]:
    with explaining(module, input_size=SHAPE) as explain:
        yield explain


@pytest.fixture(scope="module")
def x(digits: tuple[Tensor, Tensor]) -> Tensor:
    return digits[0][N_TRAINED : N_TRAINED + N_EXPLAINED]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_half_precision_a_trained_networks_pixels_keep_their_order(
    precision: str, module: nn.Module, explain: Explain, x: Tensor
) -> None:
    question = {"channels": Channels.MAX_ABS, "score": Score.PROBABILITY}
    exact = explain(x, Gradient(), **question).maps
    with explaining(module, input_size=SHAPE, precision=precision) as explain_in_half:
        half = explain_in_half(x, Gradient(), **question).maps
    ranks = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(exact, half, strict=True)]
    assert np.mean(ranks) >= 0.95
    assert not np.array_equal(exact, half)


def areas(module: nn.Module, x: Tensor, maps: np.ndarray) -> tuple[float, float]:
    """Return the areas under the deletion and the insertion curve.

    A curve is the mean probability while pixels are removed, or added, in the order of their rank.

    Petsiuk, Das and Saenko, 2018. A removed pixel is 0, as the digits' background is.
    """
    predicted = module(x).argmax(dim=1)
    rank = torch.from_numpy((-maps.reshape(len(maps), -1)).argsort(axis=1).argsort(axis=1)).view(-1, 1, 8, 8)
    curves = []
    for n in range(0, 65, AT_ONCE):
        shown = torch.cat([x * (rank >= n), x * (rank < n)])
        probable = module(shown).softmax(dim=1).gather(1, predicted.repeat(2)[:, None])
        curves.append(probable.view(2, -1).mean(dim=1))
    return tuple(torch.stack(curves).mean(dim=0).tolist())


@pytest.fixture(scope="module")
def by_chance(module: nn.Module, x: Tensor) -> tuple[float, float]:
    rng = np.random.default_rng(1)
    both = [areas(module, x, rng.normal(size=(len(x), 8, 8))) for _ in range(N_RANDOM)]
    return tuple(np.mean(both, axis=0))


def test_the_net_has_learned_the_digits(module: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    pictures, classes = (each[N_TRAINED:] for each in digits)
    assert float((module(pictures).argmax(dim=1) == classes).float().mean()) >= 0.97


@pytest.mark.parametrize("method", METHODS)
def test_a_map_ranks_pixels_better_than_chance(
    method: str, module: nn.Module, explain: Explain, x: Tensor, by_chance: tuple[float, float]
) -> None:
    maps = explain(x, METHODS[method], channels=Channels.SUM).maps
    deletion, insertion = areas(module, x, maps)
    assert deletion < by_chance[0]
    assert insertion > by_chance[1]


@pytest.mark.parametrize("score", [Score.PROBABILITY, Score.LOGIT], ids=lambda score: score.value)
def test_fifty_nodes_are_complete_to_half_a_percent(score: Score, explain: Explain, x: Tensor) -> None:
    answer = explain(x, IntegratedGradients(50), score=score)
    errors = [each.convergence.relative_completeness_error for each in answer.explanations]
    assert np.median(errors) <= 0.005


def randomised(module: nn.Sequential, n: int, *, seed: int) -> nn.Sequential:
    """Return a copy whose n topmost layers have fresh weights: Adebayo and others, 2018, "Sanity Checks"."""
    module = copy.deepcopy(module)
    torch.manual_seed(seed)
    for name in LAYERS[:n]:
        module[int(name)].reset_parameters()
    return module


def correlation(maps: np.ndarray, others: np.ndarray) -> float:
    """Return the mean over the examples of the rank correlation of their maps."""
    return float(np.mean([spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(maps, others, strict=True)]))


def cascade(method: Method, module: nn.Sequential, x: Tensor) -> list[float]:
    """Return the mean correlation of maps with their originals, with the topmost 1, 2, … layers randomized."""

    def maps(module: nn.Sequential) -> np.ndarray:
        with explaining(module, input_size=SHAPE) as explain:
            return explain(x[:20], method, target=3, channels=Channels.SUM).maps

    trained = maps(module)
    return [
        float(np.mean([correlation(trained, maps(randomised(module, n, seed=seed))) for seed in range(4)]))
        for n in (1, 2, len(LAYERS))
    ]


@pytest.mark.parametrize(
    "method",
    [
        Gradient(Magnitude.SIGNED),
        SmoothGrad(10, base=Gradient(Magnitude.SIGNED)),
        IntegratedGradients(10),
        GradCAM("3", keep_negative=True),
    ],
    ids=lambda method: method.name,
)
def test_random_weights_from_the_top_destroy_a_map(method: Method, module: nn.Sequential, x: Tensor) -> None:
    # By four seeds and twenty digits that look alike, chance leaves up to a quarter.
    assert np.abs(cascade(method, module, x)).max() < 0.35


def test_of_random_weights_at_the_top_guided_backpropagation_takes_little_notice(
    module: nn.Sequential, x: Tensor
) -> None:
    """As the authors found, the map hardly changes: it remains a picture of the digit."""
    assert min(cascade(GuidedBackpropagation(Magnitude.SIGNED), module, x)[:2]) > 0.6
