"""Scores of confident predictions: the head keeps their precision, and reports where the rest of the model lost it.

The truth is a float64 copy of the module with p = 1 / (1 + Σ exp(zⱼ − zₖ)), which has all its digits at both ends.
"""

import copy
import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sidelight_server import (
    RISE,
    Answer,
    Channels,
    Contrast,
    Engine,
    Gradient,
    IntegratedGradients,
    ModelSpec,
    Occlusion,
    Score,
    Settings,
    SmoothGrad,
    TopK,
)
from sidelight_server.compute.outputs.head import MOST_LOG_ODDS, Head
from sidelight_server.domain import PREDICTED, Region, ResolvedTarget
from sklearn.datasets import load_digits
from torch import Tensor, nn

from support.engines import ask, explaining
from support.models import Linear

GAPS = torch.arange(5.0, 41.0)


def log_odds(logits: Tensor, k: int) -> Tensor:
    """log(p / (1 − p)) of one class, of logits [n, K, …]; of a single one the logit of its own side."""
    if logits.shape[1] == 1:
        return logits[:, 0] if k else -logits[:, 0]
    others = [j for j in range(logits.shape[1]) if j != k]
    return -(logits[:, others] - logits[:, k : k + 1]).exp().sum(dim=1).log()


def true_score(score: Score, logits: Tensor, k: int) -> Tensor:
    """A score, [n, …], by formulas that lose nothing in float64."""
    match score:
        case Score.PROBABILITY:
            return 1 / (1 + (-log_odds(logits, k)).exp())
        case Score.LOG_PROBABILITY:
            return -(-log_odds(logits, k)).exp().log1p()
        case Score.LOGIT | Score.MARGIN:
            sides = logits if logits.shape[1] > 1 else torch.cat([-logits, logits], dim=1)
            others = [j for j in range(sides.shape[1]) if j != k]
            return sides[:, k] - (sides[:, others].amax(dim=1) if score is Score.MARGIN else 0)


def errors(found: Tensor, truth: Tensor) -> Tensor:
    """The error of each row, relative to its norm."""
    found, truth = found.flatten(1).double(), truth.flatten(1)
    return (found - truth).norm(dim=1) / truth.norm(dim=1)


# The head alone, on float32 logits as they are.


def confident(n_classes: int, *, size: tuple[int, ...] = ()) -> Tensor:
    """Float32 logits, [n, K, …], in which the log-odds of class 1, or of class 0, are about each of GAPS."""
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * len(GAPS), n_classes, *size, generator=draws, dtype=torch.float64)
    ahead = GAPS.view(-1, *[1] * len(size)).double()
    half = len(GAPS)
    if n_classes == 1:
        logits[:half, 0], logits[half:, 0] = ahead, -ahead
    else:
        logits[:half, 1] += ahead - log_odds(logits[:half], 1)
        logits[half:, 0] += ahead - log_odds(logits[half:], 0)
    return logits.float()


@pytest.mark.parametrize("score", Score, ids=lambda score: score.value)
@pytest.mark.parametrize("n_classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("k", [0, 1])
def test_scores_and_their_gradients_keep_their_digits_at_any_gap(score: Score, n_classes: int, k: int) -> None:
    logits = confident(n_classes)
    n = len(logits)
    output = Head().score(logits, torch.full((n,), k), [PREDICTED] * n, [score] * n, gradient=True)
    leaf = logits.double().requires_grad_()
    expected = true_score(score, leaf, k)
    (sent,) = torch.autograd.grad(expected.sum(), leaf)
    assert errors(output.grad_outputs, sent).max() < 1e-5  # that of the class far behind, in float32: 2e-6
    torch.testing.assert_close(output.scores.double(), expected.detach(), rtol=1e-5, atol=0)
    assert not output.is_dead.any()


@pytest.mark.parametrize("score", [Score.PROBABILITY, Score.LOG_PROBABILITY], ids=lambda score: score.value)
def test_labels_of_their_own_keep_their_digits(score: Score) -> None:
    logits = confident(1).expand(-1, 3).contiguous()
    n = len(logits)
    head = Head(activation="sigmoid")
    output = head.score(logits, torch.full((n,), 2), [PREDICTED] * n, [score] * n, gradient=True)
    leaf = logits.double().requires_grad_()
    (sent,) = torch.autograd.grad(true_score(score, leaf[:, 2:], 1).sum(), leaf)
    assert errors(output.grad_outputs, sent).max() < 1e-6


@pytest.mark.parametrize("score", Score, ids=lambda score: score.value)
def test_a_contrast_and_a_region_keep_their_digits(score: Score) -> None:
    logits = confident(4, size=(3, 5))
    n = len(logits)
    region = Region(1, 0, 2, 4)
    resolved_targets = [
        ResolvedTarget(1, 0, region),
        ResolvedTarget(0, 1),
        ResolvedTarget(1, region=region),
        ResolvedTarget(0),
    ] * (n // 4)
    classes = torch.tensor([resolved.positive for resolved in resolved_targets])
    output = Head().score(logits, classes, resolved_targets, [score] * n, gradient=True)
    leaf = logits.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, resolved in zip(leaf, resolved_targets, strict=True):
        cut = row[:, 1:3, 0:4] if resolved.region else row
        total = total + true_score(score, cut[None], resolved.positive).sum()
        if resolved.negative is not None:
            total = total - true_score(score, cut[None], resolved.negative).sum()
    (sent,) = torch.autograd.grad(total, leaf)
    assert errors(output.grad_outputs, sent).max() < 1e-5


def test_scores_may_mix_and_rows_below_the_threshold_keep_torchs_bits() -> None:
    draws = torch.Generator().manual_seed(1)
    logits = torch.cat([confident(10), 2 * torch.randn(40, 10, generator=draws)])
    n, classes = len(logits), logits.argmax(dim=1)
    wanted = [list(Score)[i % 4] for i in range(n)]
    output = Head().score(logits, classes, [PREDICTED] * n, wanted, gradient=True)
    leaf = logits.clone().requires_grad_()
    (plain,) = torch.autograd.grad(leaf.softmax(dim=1).gather(1, classes[:, None]).sum(), leaf)
    n_equal = 0
    for row, score in enumerate(wanted):
        alone = Head().score(logits[[row]], classes[[row]], [PREDICTED], [score], gradient=True)
        assert torch.equal(output.grad_outputs[row], alone.grad_outputs[0])
        assert output.scores[row] == alone.scores[0]
        if score is Score.PROBABILITY and log_odds(logits[[row]].double(), int(classes[row])) < MOST_LOG_ODDS - 1e-6:
            assert torch.equal(output.grad_outputs[row], plain[row])
            n_equal += 1
    assert n_equal > 5


def test_below_the_threshold_float32_is_right_to_the_figure_that_is_stated() -> None:
    draws = torch.Generator().manual_seed(2)
    for n_classes in (2, 10, 1000):
        logits = 3 * torch.randn(4000, n_classes, generator=draws, dtype=torch.float64)
        ahead = MOST_LOG_ODDS - torch.rand(4000, generator=draws, dtype=torch.float64)
        logits[:, 1] += ahead - log_odds(logits, 1)
        logits = (logits + 5 * torch.randn(4000, 1, generator=draws)).float()
        leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        (plain,) = torch.autograd.grad(leaf.softmax(dim=1)[:, 1].sum(), leaf)
        (truth,) = torch.autograd.grad(true_score(Score.PROBABILITY, exact, 1).sum(), exact)
        assert errors(plain, truth).max() < 1e-4


# A trained network.


@functools.cache
def digits() -> tuple[nn.Module, Tensor]:
    """A CNN with probabilities near 1 for nearly every picture, and the 397 pictures that it was not trained on."""
    loaded = load_digits()
    pictures = torch.from_numpy(loaded.images).float()[:, None] / 16
    classes = torch.from_numpy(loaded.target)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(12):
        for batch in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(pictures[batch]), classes[batch]).backward()
            optimizer.step()
    torch.set_num_threads(threads)
    return module.eval().requires_grad_(False), pictures[1400:]


def truth(module: nn.Module, x: Tensor, score: Score, classes: Tensor) -> Tensor:
    """The gradient of each picture's score, by autograd in float64."""
    leaf = x.double().requires_grad_()
    logits = copy.deepcopy(module).double()(leaf)
    scored = torch.stack([true_score(score, logits[[i]], int(k))[0] for i, k in enumerate(classes)])
    return torch.autograd.grad(scored.sum(), leaf)[0]


@pytest.mark.parametrize("score", Score, ids=lambda score: score.value)
def test_maps_of_a_trained_network_are_those_of_its_float64_copy(score: Score) -> None:
    module, x = digits()
    with explaining(module, input_size=(1, 8, 8)) as explain:
        answer = explain(x, Gradient(), score=score)
    classes = torch.tensor([each.predicted for each in answer.explanations])
    expected = truth(module, x, score, classes)
    found, maps = torch.from_numpy(answer.maps).flatten(1).double(), expected.flatten(1)
    assert log_odds_of_largest(module(x)).median() > MOST_LOG_ODDS
    assert errors(found, expected).max() < 1e-4
    assert errors(nn.functional.normalize(found), nn.functional.normalize(maps)).median() < 3e-7  # in direction
    assert errors(found, expected).median() < 2e-6  # a probability's size moves with the last bits of float32 logits
    assert not any(each.targets[0].saturated for each in answer.explanations)


@pytest.mark.parametrize("score", [Score.PROBABILITY, Score.LOG_PROBABILITY], ids=lambda score: score.value)
def test_maps_at_any_gap_are_those_of_the_float64_copy(score: Score) -> None:
    """Also of the classes that are not predicted, and of a difference."""
    module = Linear()
    x = (confident(10).double() - module.linear.bias.double()) @ torch.linalg.pinv(module.linear.weight.double()).T
    x = x.detach().float().view(-1, 3, 4, 5)
    with explaining(module, input_size=(3, 4, 5)) as explain:
        answer = explain(x, Gradient(), score=score, target=TopK(3))
        contrast = explain(x, Gradient(), score=score, target=Contrast(0, 1))
    for k in range(3):
        classes = torch.tensor([each.targets[k].index for each in answer.explanations])
        assert errors(torch.from_numpy(answer.maps[:, k]), truth(module, x, score, classes)).max() < 1e-4
    parts = [truth(module, x, score, torch.full((len(x),), k)) for k in (0, 1)]
    assert errors(torch.from_numpy(contrast.maps), parts[0] - parts[1]).max() < 1e-4


class Certain(nn.Module):
    """Three classes; the value of the first pixel is the lead of the first class's logit."""

    def __init__(self, *, after: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0], [0.0], [0.0]]))
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(nn.functional.linear(x[:, 0, 0, :1], self.weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("score", [Score.PROBABILITY, Score.LOG_PROBABILITY], ids=lambda score: score.value)
def test_a_module_in_half_precision_has_the_same_head(dtype: torch.dtype, score: Score) -> None:
    """Its logits here are whole numbers, exact in any type."""
    ahead = torch.tensor([0.0, 5.0, 8.0, 17.0, 30.0, 60.0])
    with explaining(Certain().to(dtype)) as explain:
        answer = explain(ahead.view(-1, 1, 1, 1), Gradient(), target=0, score=score)
    falls = (ahead.double() - np.log(2)).neg().sigmoid()  # 1 − p, and the slope of log p
    slope = falls * (1 - falls) if score is Score.PROBABILITY else falls
    # The module rounds what goes back through it to 8 bits, or with float16 to 11.
    np.testing.assert_allclose(answer.maps[:, 0, 0, 0], slope, rtol=2 * torch.finfo(dtype).eps)
    scores = [each.targets[0].score for each in answer.explanations]
    np.testing.assert_allclose(scores, 1 - falls if score is Score.PROBABILITY else (-falls).log1p(), rtol=1e-6)


# What the answer reports.


def flags(answer: Answer) -> list[bool]:
    return [each.targets[0].saturated for each in answer.explanations]


AHEAD = torch.tensor([0.0, 8.0, 17.0, 40.0, 60.0, 70.0, 200.0]).view(-1, 1, 1, 1)


@pytest.mark.parametrize("score", Score, ids=lambda score: score.value)
@pytest.mark.parametrize("target", [0, Contrast(0, 1)], ids=["class", "contrast"])
def test_a_score_is_saturated_where_nothing_of_its_map_is_left(score: Score, target: object) -> None:
    with explaining(Certain()) as explain:
        answer = explain(AHEAD, Gradient(), target=target, score=score)
    dead = score in (Score.PROBABILITY, Score.LOG_PROBABILITY)
    if isinstance(target, Contrast):
        dead = score is Score.PROBABILITY  # the logarithms' difference is that of the logits
    expected = [dead and ahead > 66 for ahead in AHEAD.flatten().tolist()]
    assert flags(answer) == expected
    assert all(answer.maps[~np.array(expected)].any(axis=(1, 2, 3)))


@pytest.mark.parametrize(
    ("method", "saturates"),
    [
        (Gradient(times_input=True), True),
        (SmoothGrad(3, noise_level=0.0), True),
        (IntegratedGradients(32), False),
        (Occlusion(window=(1, 1)), False),
        (RISE(masks=5, cells=1), False),
    ],
    ids=lambda each: getattr(each, "name", None),
)
def test_only_what_was_differentiated_can_be_saturated(method: object, saturates: bool) -> None:
    """A path from 0 comes past where the score rises; occlusion and RISE take no gradient."""
    with explaining(Certain(), input_size=(1, 1, 1)) as explain:
        answer = explain(AHEAD[-1:], method, target=0, score=Score.PROBABILITY)
    assert flags(answer) == [saturates]


@pytest.mark.parametrize("after", [lambda logits: logits.softmax(dim=1), torch.sigmoid], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("score", [Score.PROBABILITY, Score.LOG_PROBABILITY], ids=lambda score: score.value)
def test_probabilities_that_the_module_rounds_to_0_or_1_are_saturated(
    after: Callable[[Tensor], Tensor], score: Score
) -> None:
    with explaining(Certain(after=after), input_size=(1, 1, 1), output_kind="probabilities") as explain:
        first, second = (explain(AHEAD[:-1], Gradient(), target=k, score=score) for k in (0, 1))
    assert flags(first) == [ahead > 14 for ahead in AHEAD[:-1].flatten().tolist()]
    # The second's is 0.5 by sigmoid, and by softmax near 0, where nothing is lost.
    assert flags(second) == [ahead > 66 and after is not torch.sigmoid for ahead in AHEAD[:-1].flatten().tolist()]


@pytest.mark.parametrize(
    ("score", "dtype", "expected"),
    [
        (Score.PROBABILITY, torch.float32, "float32, float64 near saturation"),
        (Score.LOGIT, torch.float32, "float64"),
        (Score.LOG_PROBABILITY, torch.bfloat16, "float64"),
        (Score.PROBABILITY, torch.float16, "float32, float64 near saturation"),
        (Score.PROBABILITY, torch.float64, "float64"),
    ],
)
def test_the_heads_precision_is_reported(score: Score, dtype: torch.dtype, expected: str) -> None:
    with explaining(Certain().to(dtype)) as explain:
        assert explain(AHEAD, Gradient(), score=score).provenance.head_precision == expected


def test_the_drop_in_class_has_torchs_own_bits_at_any_gap() -> None:
    torch.set_num_threads(1)
    module, x = digits()
    leaf = x.clone().requires_grad_()
    logits = module(leaf)
    logits.softmax(dim=1).gather(1, logits.argmax(dim=1)[:, None]).sum().backward()
    expected = leaf.grad.abs().amax(dim=1)
    from sidelight.pyhealth import BasicGradientSaliencyMaps

    with BasicGradientSaliencyMaps(module) as saliency:
        assert torch.equal(saliency.attribute(image=x)["image"], expected)
    with Engine([ModelSpec(module)], Settings(device="cpu", threads=1, max_chunk_rows=1000)) as engine:
        answers = [
            ask(engine, x, score=Score.PROBABILITY, channels=Channels.MAX_ABS, plain_head=plain)
            for plain in (True, False)
        ]
    np.testing.assert_array_equal(answers[0].maps, expected)
    assert answers[0].provenance.head_precision == "float32"
    is_near = (log_odds_of_largest(logits) > MOST_LOG_ODDS).numpy()
    np.testing.assert_array_equal(answers[1].maps[~is_near], expected[~is_near])
    assert not np.array_equal(answers[1].maps[is_near], expected[is_near])


def log_odds_of_largest(logits: Tensor) -> Tensor:
    return torch.stack([log_odds(row[None].double(), int(row.argmax()))[0] for row in logits.detach()])
