"""Targets and scores: which number of which class is explained. In float64, compared with torch.autograd."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from sidelight_server import (
    RISE,
    Answer,
    Channels,
    Contrast,
    Engine,
    ExpectedGradients,
    GradCAM,
    Gradient,
    IntegratedGradients,
    LayerGradientXActivation,
    ModelSpec,
    Occlusion,
    Predicted,
    Rule,
    Score,
    Settings,
    SmoothGrad,
    TopK,
)
from sidelight_server.errors import FailedPrecondition, InvalidArgument
from torch import Tensor, nn

from support.engines import Explain, ask, assert_close, explaining
from support.models import small_cnn

SHAPE = (2, 12, 12)
METHODS = {
    "gradient": Gradient(),
    "smoothgrad": SmoothGrad(4),
    "integrated gradients": IntegratedGradients(6),
    "trapezoid": IntegratedGradients(6, Rule.TRAPEZOID),
    "expected gradients": ExpectedGradients(5),
    "grad-cam": GradCAM(keep_negative=True),
    "layer gradient times activation": LayerGradientXActivation(),
    "occlusion": Occlusion((4, 4), (3, 3)),
    "rise": RISE(masks=20, cells=3),
}


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return small_cnn(2, size=12).double().eval()


@pytest.fixture(scope="module")
def explain(module: nn.Module) -> Iterator[Explain]:
    with explaining(module, input_size=SHAPE) as explain:
        yield explain


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def gradient_of(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of each example's own score, [n], by its own input."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(score(x).sum(), x)[0]


def scores_of(answer: Answer) -> list[float]:
    return [each.targets[0].score for each in answer.explanations]


def classes_of(answer: Answer) -> list[int]:
    return [each.targets[0].index for each in answer.explanations]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", [Channels.NONE, Channels.MAX_ABS], ids=lambda each: each.value)
def test_the_maps_of_the_top_k_are_those_of_its_classes_one_by_one(
    method: str, channels: Channels, module: nn.Module, explain: Explain, x: Tensor
) -> None:
    chosen, options = METHODS[method], {"score": Score.PROBABILITY, "channels": channels}
    answer = explain(x, chosen, target=TopK(3), **options)
    assert answer.maps.shape == (4, 3, *(SHAPE if channels is Channels.NONE else SHAPE[1:]))
    most = module(x).softmax(dim=1).topk(3)
    for place, each in enumerate(answer.explanations):
        assert [one.index for one in each.targets] == most.indices[place].tolist()
        assert each.predicted == most.indices[place][0]
        np.testing.assert_allclose([one.score for one in each.targets], most.values[place].detach(), rtol=1e-9)
        for k, one in enumerate(each.targets):
            alone = explain(x[place : place + 1], chosen, target=one.index, **options)
            assert_close(answer.maps[place, k], alone.maps[0])


def test_one_of_the_top_still_has_a_dimension(explain: Explain, x: Tensor) -> None:
    assert_close(explain(x, Gradient(), target=TopK(1)).maps[:, 0], explain(x, Gradient(), target=Predicted()).maps)


@pytest.mark.parametrize("k", [-1, 0, 11])
def test_a_top_k_is_limited_to_the_number_of_classes(k: int, explain: Explain, x: Tensor) -> None:
    with pytest.raises(InvalidArgument, match=rf"target\.top_k\.k: got {k}, expected 1 to 10"):
        explain(x, Gradient(), target=TopK(k))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("score", Score, ids=lambda score: score.value)
def test_a_contrast_is_the_map_of_one_class_minus_that_of_another(
    method: str, score: Score, explain: Explain, x: Tensor
) -> None:
    """For every method here is linear in the score, its signs kept."""
    options = {"score": score, "channels": Channels.SUM if "layer" in method else Channels.NONE}
    positive, negative, contrast = (
        explain(x, METHODS[method], target=target, **options) for target in (7, 2, Contrast(7, 2))
    )
    # Two maps came as float32, and may be larger than their difference.
    atol = 2e-7 * max(np.abs(each.maps).max() for each in (positive, negative))
    np.testing.assert_allclose(contrast.maps, positive.maps - negative.maps, rtol=0, atol=atol)
    rise = np.subtract(scores_of(positive), scores_of(negative))
    np.testing.assert_allclose(scores_of(contrast), rise, rtol=1e-9, atol=1e-12)
    assert {(each.targets[0].index, each.targets[0].against) for each in contrast.explanations} == {(7, 2)}


@pytest.mark.parametrize("target", [Predicted(), 5], ids=["predicted", "class 5"])
def test_the_margin_is_a_logit_minus_the_largest_other_one(
    target: Predicted | int, module: nn.Module, explain: Explain, x: Tensor
) -> None:
    k = module(x).argmax(dim=1) if isinstance(target, Predicted) else torch.full((4,), 5)

    def margin(x: Tensor) -> Tensor:
        logits = module(x)
        others = logits.scatter(1, k[:, None], -torch.inf)
        return logits.gather(1, k[:, None])[:, 0] - others.amax(dim=1)

    answer = explain(x, Gradient(), target=target, score=Score.MARGIN)
    assert_close(answer.maps, gradient_of(margin, x))
    np.testing.assert_allclose(scores_of(answer), margin(x).detach(), rtol=1e-9)


def test_labels_of_their_own_have_probabilities_of_their_own(module: nn.Module, x: Tensor) -> None:
    with explaining(module, input_size=SHAPE, activation="sigmoid") as explain:
        for score, of in ((Score.PROBABILITY, torch.sigmoid), (Score.LOG_PROBABILITY, nn.functional.logsigmoid)):
            answer = explain(x, Gradient(), target=6, score=score, probabilities=True)
            assert_close(answer.maps, gradient_of(lambda x, of=of: of(module(x)[:, 6]), x))
            np.testing.assert_allclose(scores_of(answer), of(module(x)[:, 6]).detach(), rtol=1e-9)
            assert_close(answer.probabilities, torch.sigmoid(module(x)))
        assert [each.predicted for each in answer.explanations] == module(x).argmax(dim=1).tolist()
        probable = [each.probability for each in answer.explanations]
        np.testing.assert_allclose(probable, torch.sigmoid(module(x)).amax(dim=1).detach(), rtol=1e-9)


class OneOutput(nn.Module):
    """The logit of class 1, or its probability."""

    def __init__(self, *, logits: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.logits = logits
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(400, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.layers(x)
        return z if self.logits else torch.sigmoid(z)


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_a_single_output_is_explained_on_the_side_that_is_predicted(outputs: str, x: Tensor) -> None:
    module = OneOutput(logits=outputs == "logits").double()
    logits = module.layers
    p = torch.sigmoid(logits(x))[:, 0].detach()
    predicted = (p >= 0.5).long()
    assert set(predicted.tolist()) == {0, 1}
    up = gradient_of(lambda x: torch.sigmoid(logits(x)), x)
    spec = {"input_size": SHAPE, "output_kind": outputs, "class_names": ("no", "yes")}
    with explaining(module, **spec) as explain:
        answer = explain(x, Gradient(), score=Score.PROBABILITY, probabilities=True)
        for target, expected in (("yes", up), (1, up), ("no", -up), (0, -up)):
            assert_close(explain(x, Gradient(), target=target, score=Score.PROBABILITY).maps, expected)
        both = explain(x, Gradient(), target=TopK(2), score=Score.PROBABILITY)
        log = explain(x, Gradient(), target=0, score=Score.LOG_PROBABILITY)
        integral = explain(x, IntegratedGradients(40), target=0, score=Score.PROBABILITY)
    assert [each.predicted for each in answer.explanations] == classes_of(answer) == predicted.tolist()
    sign = (2 * predicted - 1).view(-1, 1, 1, 1)
    assert_close(answer.maps, sign * up)
    assert_close(both.maps, torch.stack([sign * up, -sign * up], dim=1))
    assert_close(log.maps, gradient_of(lambda x: nn.functional.logsigmoid(-logits(x)), x))
    np.testing.assert_allclose(scores_of(answer), torch.maximum(p, 1 - p), rtol=1e-9)
    assert_close(answer.probabilities, torch.stack([1 - p, p], dim=1))
    falls = integral.maps.sum(axis=(1, 2, 3), dtype=np.float64)
    np.testing.assert_allclose(falls, 0.5 - p, atol=1e-5)  # at 0, where there is no bias, p is 0.5


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_a_single_output_is_class_1_from_one_half_on(outputs: str) -> None:
    nothing = torch.zeros(1, *SHAPE, dtype=torch.float64)
    with explaining(OneOutput(logits=outputs == "logits").double(), output_kind=outputs) as explain:
        answer = explain(nothing, Gradient(), score=Score.PROBABILITY)
    assert (answer.explanations[0].predicted, answer.explanations[0].probability) == (1, 0.5)


def test_the_logit_of_a_single_outputs_other_side_is_its_negative(x: Tensor) -> None:
    module = OneOutput(logits=True).double()
    with explaining(module) as explain:
        assert_close(explain(x, Gradient(), target=0).maps, -gradient_of(module, x))
        assert_close(explain(x, Gradient(), target=1, score=Score.MARGIN).maps, 2 * gradient_of(module, x))


@pytest.mark.parametrize("score", [Score.LOGIT, Score.MARGIN], ids=lambda score: score.value)
def test_probabilities_have_no_logits(score: Score, x: Tensor) -> None:
    with (
        Engine(
            [ModelSpec(OneOutput(logits=False).double(), output_kind="probabilities")], Settings(device="cpu")
        ) as engine,
        pytest.raises(FailedPrecondition, match=rf"no {score.value}; it has probability, log_probability"),
    ):
        ask(engine, x, score=score)
