"""Options of calls: targets and scores in every form, and the messages for wrong ones."""

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from torch import nn

from support.models import LABELS, N_CLASSES, small_cnn
from support.tolerances import assert_same


def reference(
    module: nn.Module, x: torch.Tensor, classes: Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the probabilities, [N, K], and the signed gradients of the classes' probabilities, [N, C, H, W]."""
    module, x = copy.deepcopy(module).eval(), x.clone().requires_grad_()
    probabilities = module(x).softmax(dim=1)
    explained = probabilities.argmax(dim=1) if classes is None else torch.tensor(classes)
    (gradients,) = torch.autograd.grad(probabilities.gather(1, explained[:, None]).sum(), x)
    return probabilities.detach(), gradients


TYPOS = {
    "score": (
        {"score": "probabilty"},
        "score: got 'probabilty', expected one of probability, logit, log_probability, margin",
    ),
    "channels": (
        {"channels": "max"},
        "channels: got 'max', expected one of max_abs, sum, mean_abs, l2, none",
    ),
    "map_dtype": ({"map_dtype": "bfloat16"}, "map_dtype: got 'bfloat16', expected one of float32, float16, uint8"),
    "method-option": ({"method": sidelight.SmoothGrad(samples=1.5)}, "method.samples: got 1.5, expected a whole"),
    "on_error": ({"on_error": "ignore"}, "on_error: got 'ignore', expected one of raise, return"),
    "method-name": ({"method": "gradient"}, "method: got 'gradient', expected a method, such as sidelight.Gradient()"),
    "method-class": ({"method": sidelight.Gradient}, "expected a method, such as sidelight.Gradient()"),
    "target-type": ({"target": 1.5}, "target: got float, expected None, a class index, a label or a list of them"),
    "target-dict": ({"target": {}}, "target: got dict, expected None"),
    "target-element": ({"target": [1, None, 2, 3, 4]}, "target: got None in the list, expected class indices or"),
    "target-float-array": ({"target": np.ones(5)}, "in the list, expected class indices or labels"),
    "target-two-dimensions": ({"target": np.ones((5, 1), int)}, "in the list, expected class indices or labels"),
    "target-beyond-64-bits": ({"target": 2**63}, "target: got 9223372036854775808, expected a 64-bit number"),
}


@pytest.mark.parametrize(("options", "message"), TYPOS.values(), ids=TYPOS.keys())
@pytest.mark.parametrize("way", ["attribute", "stream"])
def test_a_wrong_option_is_refused_and_the_right_ones_named(
    client: sidelight.Client, floats: torch.Tensor, options: dict[str, object], message: str, way: str
) -> None:
    with pytest.raises(sidelight.InvalidArgument) as caught:
        client.attribute(floats, **options) if way == "attribute" else list(client.stream([floats], **options))
    assert message in caught.value.message


REFUSED_TARGETS = {
    "negative": (-1, sidelight.InvalidArgument, 'target: class index -1, model "small" has 0 to 9'),
    "too-large": (10, sidelight.InvalidArgument, 'target: class index 10, model "small" has 0 to 9'),
    "one-too-large": ([1, 2, 3, 4, 10], sidelight.InvalidArgument, "target: class index 10"),
    "too-few": ([1, 2], sidelight.InvalidArgument, "target: 2 classes for 5 examples, expected one for each"),
    "none-at-all": ([], sidelight.InvalidArgument, "target: 0 classes for 5 examples"),
    "unknown-label": ("elc", sidelight.NotFound, 'target: model "small" has no label "elc"; did you mean "elk"?'),
    "one-unknown-label": (["ant", "bee", 1, 2, "gnuu"], sidelight.NotFound, 'no label "gnuu"; did you mean "gnu"?'),
    "ambiguous-label": ("cat", sidelight.InvalidArgument, 'label "cat" names the classes 2, 3; give one of these'),
}


@pytest.mark.parametrize(("target", "kind", "message"), REFUSED_TARGETS.values(), ids=REFUSED_TARGETS.keys())
def test_a_target_that_the_model_does_not_have_is_refused_with_those_it_has(
    client: sidelight.Client, floats: torch.Tensor, target: object, kind: type[sidelight.SidelightError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        client.attribute(floats, target=target)
    assert message in caught.value.message


TARGETS: dict[str, tuple[object, list[int]]] = {
    "index": (7, [7] * 5),
    "numpy-index": (np.int64(7), [7] * 5),
    "unsigned-numpy-index": (np.uint8(7), [7] * 5),
    "array-without-dimension": (np.array(7), [7] * 5),
    "label": ("gnu", [7] * 5),
    "numpy-label": (np.str_("gnu"), [7] * 5),
    "list-of-indices": ([0, 9, 2, 3, 3], [0, 9, 2, 3, 3]),
    "tuple": ((0, 9, 2, 3, 3), [0, 9, 2, 3, 3]),
    "list-of-labels": (["ant", "ibis", "bee", "elk", "elk"], [0, 9, 1, 5, 5]),
    "list-of-both": (["ant", 9, np.int32(2), np.str_("elk"), 3], [0, 9, 2, 5, 3]),
    "array": (np.array([0, 9, 2, 3, 3]), [0, 9, 2, 3, 3]),
    "array-of-bytes": (np.array([0, 9, 2, 3, 3], np.uint8), [0, 9, 2, 3, 3]),
    "array-of-labels": (np.array(["ant", "ibis", "bee", "elk", "elk"]), [0, 9, 1, 5, 5]),
    "range": (range(5), [0, 1, 2, 3, 4]),
}


@pytest.mark.parametrize(("target", "classes"), TARGETS.values(), ids=TARGETS.keys())
def test_a_target_in_any_form_is_explained(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor, target: object, classes: list[int]
) -> None:
    probabilities, gradients = reference(module, floats, classes)
    answer = client.attribute(floats, target=target, channels="none", method=sidelight.Gradient(signed=True))
    assert [each.index for each in answer.targets] == classes
    assert [each.label for each in answer.targets] == [LABELS[each] for each in classes]
    np.testing.assert_allclose([each.score for each in answer.targets], probabilities[range(5), classes], rtol=1e-5)
    assert_same(answer.maps, gradients.numpy())


def test_without_a_target_the_predicted_class_is_explained(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor
) -> None:
    probabilities, gradients = reference(module, floats)
    predicted = probabilities.argmax(dim=1).tolist()
    answer = client.attribute(floats)
    assert answer.predictions == tuple(
        sidelight.results.Prediction(index, LABELS[index], pytest.approx(float(row[index]), rel=1e-5))
        for index, row in zip(predicted, probabilities, strict=True)
    )
    assert [(each.index, each.label) for each in answer.targets] == [(i, LABELS[i]) for i in predicted]
    assert [each.score for each in answer.targets] == [each.probability for each in answer.predictions]
    assert not any(each.saturated for each in answer.targets)
    assert_same(answer.maps, gradients.abs().amax(dim=1).numpy())


def test_a_target_changes_what_is_explained_and_not_what_is_predicted(
    client: sidelight.Client, floats: torch.Tensor
) -> None:
    assert client.attribute(floats, target=0).predictions == client.attribute(floats).predictions


def test_a_sure_prediction_is_reported_to_be_saturated(device: str, module: nn.Module, floats: torch.Tensor) -> None:
    sure = nn.Sequential(copy.deepcopy(module), nn.Linear(N_CLASSES, N_CLASSES, bias=False))
    with torch.no_grad():
        sure[1].weight.copy_(1e6 * torch.eye(N_CLASSES))
    with sidelight_server.serve(sure, device=device) as address, sidelight.connect(address) as client:
        explained = client.attribute(floats).targets
        assert all(each.saturated and 'score="logit"' in each.advice for each in explained)
        as_advised = client.attribute(floats, score="logit").targets
        assert not any(each.saturated or each.advice for each in as_advised)


def test_the_probabilities_of_all_classes_come_where_they_are_asked_for(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor
) -> None:
    assert client.attribute(floats).probabilities is None
    answer = client.attribute(floats, probabilities=True)
    assert answer.probabilities.dtype == np.float32
    np.testing.assert_allclose(answer.probabilities, reference(module, floats)[0], rtol=1e-5)
    np.testing.assert_array_equal(answer.probabilities.argmax(axis=1), [each.index for each in answer.predictions])
    (streamed,) = client.stream([floats], probabilities=True)
    np.testing.assert_allclose(streamed.probabilities, answer.probabilities, rtol=1e-5)


@pytest.mark.parametrize("score", ["probability", "logit", "log_probability", "margin"])
def test_a_score_is_the_number_that_is_reported(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor, score: str
) -> None:
    logits = copy.deepcopy(module).eval()(floats).detach()
    others = logits.index_fill(1, torch.tensor(3), -math.inf).amax(1, keepdim=True)
    values = {
        "probability": logits.softmax(1),
        "logit": logits,
        "log_probability": logits.log_softmax(1),
        "margin": logits - others,
    }[score]
    answer = client.attribute(floats, target=3, score=score)
    np.testing.assert_allclose([each.score for each in answer.targets], values[:, 3], rtol=1e-5, atol=1e-6)
    assert answer.provenance.score == score


def test_a_score_that_the_model_cannot_give_is_a_failed_precondition(device: str, floats: torch.Tensor) -> None:
    module = nn.Sequential(small_cnn(), nn.Softmax(dim=1))
    spec = sidelight_server.ModelSpec(module, output_kind="probabilities")
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        with pytest.raises(sidelight.FailedPrecondition, match="it has probability, log_probability"):
            client.attribute(floats, score="logit")
        assert len(client.attribute(floats)) == 5


def test_a_model_without_labels_reports_empty_labels(device: str, module: nn.Module, floats: torch.Tensor) -> None:
    with sidelight_server.serve(module, device=device) as address, sidelight.connect(address) as client:
        assert client.info().models[0].input_size is None
        answer = client.attribute(floats)
        assert [each.label for each in answer.predictions] == [each.label for each in answer.targets] == [""] * 5
        with pytest.raises(sidelight.FailedPrecondition, match="no input size"):
            client.attribute(np.zeros((32, 32, 3), np.uint8))


def test_the_k_most_probable_classes_have_a_map_each(client: sidelight.Client, floats: torch.Tensor) -> None:
    answer = client.attribute(floats, target=sidelight.TopK(3), probabilities=True)
    assert answer.maps.shape == (5, 3, 32, 32)
    order = np.argsort(-answer.probabilities, axis=1)[:, :3]
    assert [[each.index for each in one] for one in answer.targets] == order.tolist()
    for k in range(3):
        alone = client.attribute(floats, target=order[:, k])
        assert_same(answer.maps[:, k], alone.maps)
        np.testing.assert_array_equal(answer.heatmap(2, k=k), answer.maps[2, k])
        assert answer.overlay(2, k=k).size == (32, 32)
    channels = client.attribute(floats, target=sidelight.TopK(2), channels="none")
    assert channels.maps.shape == (5, 2, 3, 32, 32)
    assert_same(channels.heatmap(1, k=1), answer.maps[1, 1])


def test_a_contrast_explains_the_difference_of_two_scores(
    client: sidelight.Client, module: nn.Module, floats: torch.Tensor
) -> None:
    answer = client.attribute(floats, target=sidelight.Contrast("gnu", 1), channels="none")
    (first, positive), (second, negative) = (reference(module, floats, [each] * 5) for each in (7, 1))
    assert_same(answer.maps, (positive - negative).numpy())
    assert [(each.index, each.label, each.against) for each in answer.targets] == [(7, "gnu", 1)] * 5
    expected = first[:, 7] - second[:, 1]
    np.testing.assert_allclose([each.score for each in answer.targets], expected, rtol=1e-4, atol=1e-6)


def test_the_server_refuses_a_number_out_of_range_with_field_got_and_expected(
    client: sidelight.Client, floats: torch.Tensor
) -> None:
    for method, fragments in {
        sidelight.IntegratedGradients(steps=0): ("steps", "0"),
        sidelight.SmoothGrad(noise_level=-0.1): ("noise_level", "-0.1"),
        sidelight.SmoothGrad(tolerance=1.5): ("tolerance", "1.5"),
        sidelight.IntegratedGradients(baseline=np.ones((3, 31, 32))): ("baseline", "[3, 31, 32]", "[3, 32, 32]"),
        sidelight.IntegratedGradients(tolerance=0.1, rule="midpoint"): ("rule", "midpoint", "trapezoid"),
        sidelight.Occlusion(window=0): ("window", "0"),
        sidelight.RISE(keep_probability=1.0): ("keep_probability", "1"),
    }.items():
        with pytest.raises(sidelight.InvalidArgument, match="expected") as caught:
            client.attribute(floats, method=method)
        assert all(each in caught.value.message for each in fragments), caught.value.message
    with pytest.raises(sidelight.NotFound, match="layer"):
        client.attribute(floats, method=sidelight.GradCAM(layer="10"))
