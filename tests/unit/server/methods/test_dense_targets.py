"""Dense models, [N, K, h, w]: a class is explained over the whole output, or over a region."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from sidelight_server import (
    Answer,
    Contrast,
    Dense,
    Engine,
    GradCAM,
    Gradient,
    IntegratedGradients,
    ModelSpec,
    Occlusion,
    Predicted,
    Region,
    Score,
    Settings,
    TopK,
)
from sidelight_server.compute.outputs.head import Head
from sidelight_server.domain import PREDICTED, ResolvedTarget
from sidelight_server.errors import FailedPrecondition, InvalidArgument, SidelightError
from torch import Tensor, nn

from support.engines import Explain, ask, assert_close, explaining
from support.models import small_cnn

SHAPE, OUTPUT = (2, 12, 15), (6, 5)
CLASS = 2
OF = {
    Score.LOGIT: lambda outputs: outputs,
    Score.PROBABILITY: lambda outputs: outputs.softmax(dim=1),
    Score.LOG_PROBABILITY: lambda outputs: outputs.log_softmax(dim=1),
}
REGIONS = {
    "all": None,
    "all, said so": Region(0, 0, *OUTPUT),
    "a part": Region(1, 2, 3, 2),
    "the last pixel": Region(5, 4, 1, 1),
}


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 4, (2, 3), stride=(2, 3))).double()


@pytest.fixture(scope="module")
def explain(module: nn.Module) -> Iterator[Explain]:
    with explaining(module, input_size=SHAPE) as explain:
        yield explain


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def summed(module: nn.Module, score: Score, region: Region | None) -> Callable[[Tensor], Tensor]:
    """Return the function of the sum of a class's scores over a region."""

    def of(x: Tensor) -> Tensor:
        scores = OF[score](module(x))[:, CLASS]
        if region is not None:
            rows, columns = (
                slice(begin, begin + length)
                for begin, length in ((region.top, region.height), (region.left, region.width))
            )
            scores = scores[:, rows, columns]
        return scores.sum(dim=(1, 2))

    return of


def refusal(engine: Engine, images: Tensor, **question: object) -> tuple[int, str]:
    """Return the code and the message by which a batch, or every example of it, is refused."""
    try:
        answer: Answer = ask(engine, images, **question)
    except SidelightError as error:
        return error.code, error.message
    assert len(answer.failures) == len(images)
    assert len({(each.code, each.message) for each in answer.failures}) == 1
    return answer.failures[0].code, answer.failures[0].message


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("score", OF, ids=lambda score: score.value)
def test_the_gradient_is_that_of_the_sum_over_the_region(
    region: str, score: Score, module: nn.Module, explain: Explain, x: Tensor
) -> None:
    of = summed(module, score, REGIONS[region])
    answer = explain(x, Gradient(), target=Dense(CLASS, REGIONS[region]), score=score)
    inputs = x.clone().requires_grad_()
    assert_close(answer.maps, torch.autograd.grad(of(inputs).sum(), inputs)[0])
    np.testing.assert_allclose([each.targets[0].score for each in answer.explanations], of(x).detach(), rtol=1e-9)


def test_without_a_region_a_dense_target_is_a_plain_one(explain: Explain, x: Tensor) -> None:
    dense, plain = (explain(x, Gradient(), target=target).maps for target in (Dense(CLASS), CLASS))
    assert_close(dense, plain)


@pytest.mark.parametrize("region", REGIONS)
def test_other_methods_add_up_over_a_region_too(region: str, module: nn.Module, explain: Explain, x: Tensor) -> None:
    target, of = Dense(CLASS, REGIONS[region]), summed(module, Score.PROBABILITY, REGIONS[region])
    integral = explain(x, IntegratedGradients(50), target=target, score=Score.PROBABILITY)
    with torch.no_grad():
        rise = of(x) - of(torch.zeros_like(x))
        hidden = of(x) - of(torch.nn.functional.pad(x[..., 15:], (15, 0)))
    # The net is analytic: 50 nodes leave nothing, and float32 6e-8 of each of 360 elements.
    sizes = np.abs(integral.maps).sum(axis=(1, 2, 3)).max()
    np.testing.assert_allclose(integral.maps.sum(axis=(1, 2, 3), dtype=np.float64), rise, rtol=0, atol=1e-6 * sizes)
    occluded = explain(x, Occlusion(SHAPE[1:]), target=target, score=Score.PROBABILITY).maps
    assert_close(occluded, hidden.view(-1, 1, 1, 1).expand_as(x))


def test_a_region_moves_the_map_of_a_layer(explain: Explain, x: Tensor) -> None:
    """The second net's convolution does not overlap: no layer before it depends on what lies outside the region."""
    maps = explain(x, GradCAM("1", keep_negative=True), target=Dense(CLASS, Region(0, 0, 6, 5))).maps
    part = explain(x, GradCAM("1", keep_negative=True), target=Dense(CLASS, Region(0, 0, 3, 5))).maps
    assert np.abs(maps - part).max() > 0.1 * np.abs(maps).max()
    gradient = explain(x, Gradient(), target=Dense(CLASS, Region(0, 0, 3, 5))).maps
    assert not gradient[:, :, 7:].any()  # three rows of two pixels, and one more that the first net looks at
    assert gradient[:, :, :7].any(axis=(1, 3)).all()


def test_the_prediction_is_the_class_of_the_largest_mean_probability(
    module: nn.Module, explain: Explain, x: Tensor
) -> None:
    answer = explain(x, Gradient(), target=Predicted(), score=Score.PROBABILITY, probabilities=True)
    mean = module(x).softmax(dim=1).mean(dim=(2, 3)).detach()  # [n, K]
    assert_close(answer.probabilities, mean)
    assert [each.predicted for each in answer.explanations] == mean.argmax(dim=1).tolist()
    assert [each.targets[0].index for each in answer.explanations] == mean.argmax(dim=1).tolist()
    np.testing.assert_allclose([each.probability for each in answer.explanations], mean.amax(dim=1), rtol=1e-9)


def test_the_top_k_and_a_contrast_are_over_all_of_the_output(explain: Explain, x: Tensor) -> None:
    single = [explain(x, Gradient(), target=Dense(k)).maps for k in range(4)]
    top = explain(x, Gradient(), target=TopK(2))
    for place, each in enumerate(top.explanations):
        for k, one in enumerate(each.targets):
            assert_close(top.maps[place, k], single[one.index][place])
    assert_close(explain(x, Gradient(), target=Contrast(3, 1)).maps, single[3] - single[1], share=4e-7)


def test_a_single_dense_output_has_two_sides(x: Tensor) -> None:
    torch.manual_seed(3)
    module = nn.Conv2d(2, 1, 3).double()
    with explaining(module) as explain:
        yes, no = (explain(x, Gradient(), target=Dense(k, Region(2, 2, 4, 4))).maps for k in (1, 0))
    inputs = x.clone().requires_grad_()
    expected = torch.autograd.grad(module(inputs)[:, 0, 2:6, 2:6].sum(), inputs)[0]
    assert_close(yes, expected)
    assert_close(no, -expected)


def test_a_sum_of_probabilities_does_not_count_as_saturated(explain: Explain, x: Tensor) -> None:
    answer = explain(x, Gradient(), target=Dense(CLASS), score=Score.PROBABILITY)
    assert {each.targets[0].saturated for each in answer.explanations} == {False}


@pytest.mark.parametrize("sized", [True, False], ids=["fixed size", "any size"])
@pytest.mark.parametrize(
    "region", [Region(3, 0, 4, 2), Region(0, 1, 2, 5), Region(6, 0, 1, 1), Region(0, 0, 12, 15)], ids=str
)
def test_a_region_beyond_the_output_is_refused(region: Region, sized: bool, module: nn.Module, x: Tensor) -> None:
    spec = ModelSpec(module, input_size=SHAPE if sized else None)
    with Engine([spec], Settings(device="cpu")) as engine:
        code, message = refusal(engine, x, target=Dense(CLASS, region))
        assert not ask(engine, x).failures  # and nothing is left of it
    assert code == InvalidArgument.code
    ends = [region.top + region.height, region.left + region.width]
    assert message == f"target.dense.region: it ends at {ends}, the model's output is [6, 5]"


@pytest.mark.parametrize("sized", [True, False], ids=["fixed size", "any size"])
def test_a_region_of_a_model_that_answers_for_the_whole_picture_is_refused(sized: bool) -> None:
    spec = ModelSpec(small_cnn(2, size=12), input_size=(2, 12, 12) if sized else None)
    with Engine([spec], Settings(device="cpu")) as engine:
        code, message = refusal(engine, torch.zeros(2, 2, 12, 12), target=Dense(CLASS, Region(0, 0, 1, 1)))
    assert code == FailedPrecondition.code
    assert message.startswith("target.dense")
    assert message.endswith("returns scores for the whole image, not each pixel")


@pytest.mark.parametrize("score", OF, ids=lambda score: score.value)
@pytest.mark.parametrize("region", REGIONS)
def test_without_a_class_each_pixels_own_largest_output_counts(
    region: str, score: Score, module: nn.Module, explain: Explain, x: Tensor
) -> None:
    inputs = x.clone().requires_grad_()
    outputs = module(inputs)
    largest = OF[score](outputs).gather(1, outputs.argmax(dim=1, keepdim=True))  # [n, 1, h, w]
    if (box := REGIONS[region]) is not None:
        largest = largest[..., box.top : box.top + box.height, box.left : box.left + box.width]
    answer = explain(x, Gradient(), target=Dense(None, REGIONS[region]), score=score)
    assert len(outputs.argmax(dim=1).unique()) > 1  # or it would be a plain class
    assert_close(answer.maps, torch.autograd.grad(largest.sum(), inputs)[0])
    explained = [each.targets[0] for each in answer.explanations]
    np.testing.assert_allclose([each.score for each in explained], largest.sum(dim=(1, 2, 3)).detach(), rtol=1e-9)
    assert [each.index for each in explained] == [each.predicted for each in answer.explanations]


def test_rows_with_a_class_and_without_share_a_chunk(module: nn.Module, x: Tensor) -> None:
    head = Head()
    resolved_targets = [
        ResolvedTarget(each_pixel=True),
        ResolvedTarget(CLASS),
        ResolvedTarget(each_pixel=True),
        PREDICTED,
    ]
    outputs = module(x)
    scores = [Score.LOGIT, Score.LOGIT, Score.PROBABILITY, Score.LOGIT]
    selected = head.select(outputs, torch.tensor([0, CLASS, 0, 1]), resolved_targets, scores)
    alone = [
        head.select(
            outputs[i : i + 1], torch.tensor([[0, CLASS, 0, 1][i]]), resolved_targets[i : i + 1], scores[i : i + 1]
        )
        for i in range(4)
    ]
    torch.testing.assert_close(selected, torch.cat(alone))


def test_where_outputs_tie_the_first_class_counts_alone() -> None:
    """As of `argmax`: the gradient is not shared among them."""
    weight = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64).view(3, 1, 1, 1)
    module = nn.Conv2d(1, 3, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(weight)
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    with explaining(module, input_size=(1, 2, 2)) as explain:
        maps = explain(x, Gradient(), target=Dense()).maps
    assert_close(maps, torch.ones(1, 1, 2, 2))


def test_a_single_dense_output_is_its_own_largest_everywhere(x: Tensor) -> None:
    torch.manual_seed(3)
    module = nn.Conv2d(2, 1, 3).double()
    with explaining(module) as explain:
        maps = [explain(x, Gradient(), target=target).maps for target in (Dense(), Dense(1))]
    np.testing.assert_array_equal(*maps)


def test_integrated_gradients_of_the_largest_outputs_are_complete(module: nn.Module, explain: Explain) -> None:
    """Their sum is a function of the input as good as any: here with a constant class along the whole path."""
    x = torch.full((1, *SHAPE), 1e-3, dtype=torch.float64)
    answer = explain(x, IntegratedGradients(20), target=Dense())
    with torch.no_grad():
        rise = (module(x).amax(dim=1) - module(torch.zeros_like(x)).amax(dim=1)).sum()
    np.testing.assert_allclose(answer.maps.sum(dtype=np.float64), rise, rtol=1e-5)


@pytest.mark.parametrize("sized", [True, False], ids=["fixed size", "any size"])
def test_a_model_that_answers_for_the_whole_picture_has_one_pixel(sized: bool) -> None:
    spec = ModelSpec(small_cnn(2, size=12), input_size=(2, 12, 12) if sized else None)
    images = torch.rand(2, 2, 12, 12)
    with Engine([spec], Settings(device="cpu")) as engine:
        each, predicted = (ask(engine, images, target=target) for target in (Dense(), Predicted()))
        code, message = refusal(engine, images, target=Dense(None, Region(0, 0, 1, 1)))
    np.testing.assert_array_equal(each.maps, predicted.maps)
    assert each.explanations == predicted.explanations
    assert code == FailedPrecondition.code
    assert message.startswith("target.dense")
