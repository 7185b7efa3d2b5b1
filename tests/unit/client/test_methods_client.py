"""Methods and targets of the client: their messages, and what a message cannot hold."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import sidelight
import torch
from sidelight._inputs.targets import target_message, target_text
from sidelight.methods.baselines import given_array, given_tensor
from sidelight.methods.parsing import METHODS
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

ZERO = pb.Baseline(constant=0.0)

MESSAGES: dict[str, tuple[sidelight.methods.Method, pb.Method]] = {
    "gradient": (sidelight.Gradient(), pb.Method(gradient=pb.GradientMethod(magnitude=pb.MAGNITUDE_ABSOLUTE))),
    "gradient-signed": (
        sidelight.Gradient(signed=True, times_input=True),
        pb.Method(gradient=pb.GradientMethod(magnitude=pb.MAGNITUDE_SIGNED, times_input=True)),
    ),
    "gradient-squared": (
        sidelight.Gradient(squared=True),
        pb.Method(gradient=pb.GradientMethod(magnitude=pb.MAGNITUDE_SQUARED)),
    ),
    "smoothgrad": (
        sidelight.SmoothGrad(),
        pb.Method(
            smoothgrad=pb.SmoothGradMethod(
                samples=25,
                noise_level=0.15,
                statistic=pb.SmoothGradMethod.STATISTIC_MEAN,
                max_rows=300,
                base=pb.Method(gradient=pb.GradientMethod(magnitude=pb.MAGNITUDE_ABSOLUTE)),
            )
        ),
    ),
    "vargrad-over-a-path": (
        sidelight.SmoothGrad(
            samples=np.int64(7),
            noise_level=2,
            absolute_noise=np.True_,
            seed=-(2**63),
            statistic="variance",
            max_rows=9,
            base=sidelight.IntegratedGradients(steps=3, rule="midpoint", baseline="black"),
        ),
        pb.Method(
            smoothgrad=pb.SmoothGradMethod(
                samples=7,
                noise_level=2.0,
                absolute_noise=True,
                seed=-(2**63),
                statistic=pb.SmoothGradMethod.STATISTIC_VARIANCE,
                max_rows=9,
                base=pb.Method(
                    integrated_gradients=pb.IntegratedGradientsMethod(
                        steps=3,
                        rule=pb.PATH_RULE_MIDPOINT,
                        baseline=pb.Baseline(black=pb.BlackBaseline()),
                        max_rows=300,
                    )
                ),
            )
        ),
    ),
    "smoothgrad-to-a-tolerance": (
        sidelight.SmoothGrad(tolerance=0.1, statistic="mean_square", base=sidelight.Gradient(signed=True)),
        pb.Method(
            smoothgrad=pb.SmoothGradMethod(
                noise_level=0.15,
                statistic=pb.SmoothGradMethod.STATISTIC_MEAN_SQUARE,
                tolerance=0.1,
                max_rows=300,
                base=pb.Method(gradient=pb.GradientMethod(magnitude=pb.MAGNITUDE_SIGNED)),
            )
        ),
    ),
    "integrated-gradients": (
        sidelight.IntegratedGradients(),
        pb.Method(
            integrated_gradients=pb.IntegratedGradientsMethod(
                steps=50, rule=pb.PATH_RULE_GAUSS_LEGENDRE, baseline=ZERO, max_rows=300
            )
        ),
    ),
    "integrated-gradients-as-in-the-design": (
        sidelight.IntegratedGradients(steps=50, rule="gauss_legendre", baseline="zero"),
        pb.Method(
            integrated_gradients=pb.IntegratedGradientsMethod(
                steps=50, rule=pb.PATH_RULE_GAUSS_LEGENDRE, baseline=ZERO, max_rows=300
            )
        ),
    ),
    "integrated-gradients-to-a-tolerance": (
        sidelight.IntegratedGradients(tolerance=0.05, max_rows=150, baseline="mean_color"),
        pb.Method(
            integrated_gradients=pb.IntegratedGradientsMethod(
                rule=pb.PATH_RULE_TRAPEZOID,
                baseline=pb.Baseline(mean_color=pb.MeanColorBaseline()),
                tolerance=0.05,
                max_rows=150,
            )
        ),
    ),
    "expected-gradients": (
        sidelight.ExpectedGradients(),
        pb.Method(expected_gradients=pb.ExpectedGradientsMethod(samples=50)),
    ),
    "expected-gradients-of-a-set": (
        sidelight.ExpectedGradients(4, np.ones((2, 1, 1, 2), np.float32), 0.5, 3),
        pb.Method(
            expected_gradients=pb.ExpectedGradientsMethod(
                samples=4,
                baselines=tensor_pb2.Tensor(
                    dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[2, 1, 1, 2], data=b"\x00\x00\x80?" * 4
                ),
                noise_level=0.5,
                seed=3,
            )
        ),
    ),
    "grad-cam": (sidelight.GradCAM(), pb.Method(grad_cam=pb.GradCamMethod())),
    "grad-cam-of-a-layer": (
        sidelight.GradCAM(layer="layer4.1", keep_negative=True),
        pb.Method(grad_cam=pb.GradCamMethod(layer="layer4.1", keep_negative=True)),
    ),
    "layer-gradient-times-activation": (
        sidelight.LayerGradientXActivation("0"),
        pb.Method(layer_gradient_x_activation=pb.LayerGradientXActivationMethod(layer="0")),
    ),
    "occlusion": (
        sidelight.Occlusion(),
        pb.Method(
            occlusion=pb.OcclusionMethod(
                window_height=16, window_width=16, stride_height=16, stride_width=16, baseline=ZERO
            )
        ),
    ),
    "occlusion-of-oblongs": (
        sidelight.Occlusion(window=(4, 5), stride=[2, 3], baseline=sidelight.Blurred(2)),
        pb.Method(
            occlusion=pb.OcclusionMethod(
                window_height=4,
                window_width=5,
                stride_height=2,
                stride_width=3,
                baseline=pb.Baseline(blurred=pb.BlurredBaseline(sigma=2.0)),
            )
        ),
    ),
    "rise": (sidelight.RISE(), pb.Method(rise=pb.RiseMethod(masks=1000, cells=7, keep_probability=0.5))),
    "guided-backpropagation": (
        sidelight.GuidedBackpropagation(),
        pb.Method(guided_backpropagation=pb.GuidedBackpropagationMethod()),
    ),
}


@pytest.mark.parametrize(("method", "message"), MESSAGES.values(), ids=MESSAGES.keys())
def test_a_method_becomes_its_message_with_every_default(method: sidelight.methods.Method, message: pb.Method) -> None:
    assert method.message() == message
    assert method.message().WhichOneof("method") == message.WhichOneof("method")  # for those that are empty


def test_every_method_of_the_schema_has_a_class_and_every_class_is_tested() -> None:
    assert set(METHODS) == {field.name for field in pb.Method.DESCRIPTOR.fields}
    assert {type(method) for method, _ in MESSAGES.values()} == set(METHODS.values())
    for name, each in METHODS.items():
        assert each().message().WhichOneof("method") == name
        assert isinstance(each(), sidelight.methods.Method)
        assert getattr(sidelight, each.__name__) is each


@pytest.mark.parametrize("message", [message for _, message in MESSAGES.values()], ids=list(MESSAGES))
def test_what_the_schema_requires_is_filled_in(message: pb.Method) -> None:
    """No enum is left unspecified and no baseline unset: a later server's defaults change nothing."""
    chosen = getattr(message, message.WhichOneof("method"))
    for field in chosen.DESCRIPTOR.fields:
        if field.enum_type is not None:
            assert getattr(chosen, field.name) != 0, field.name
        if field.name in ("baseline", "base"):
            assert chosen.HasField(field.name)


BASELINES: dict[str, tuple[object, pb.Baseline]] = {
    "zero": ("zero", ZERO),
    "black": ("black", pb.Baseline(black=pb.BlackBaseline())),
    "mean-color": ("mean_color", pb.Baseline(mean_color=pb.MeanColorBaseline())),
    "blurred-by-name": ("blurred", pb.Baseline(blurred=pb.BlurredBaseline(sigma=10.0))),
    "blurred": (sidelight.Blurred(sigma=3), pb.Baseline(blurred=pb.BlurredBaseline(sigma=3.0))),
    "number": (-1.5, pb.Baseline(constant=-1.5)),
    "whole-number": (2, pb.Baseline(constant=2.0)),
    "numpy-number": (np.float32(0.5), pb.Baseline(constant=0.5)),
}


@pytest.mark.parametrize(("baseline", "message"), BASELINES.values(), ids=BASELINES.keys())
def test_a_baseline_has_many_forms(baseline: object, message: pb.Baseline) -> None:
    assert sidelight.IntegratedGradients(baseline=baseline).message().integrated_gradients.baseline == message
    sent = sidelight.Occlusion(baseline=baseline).message().occlusion.baseline
    assert (sent, sent.WhichOneof("baseline")) == (message, message.WhichOneof("baseline"))


class Foreign:
    """An array of another library."""

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return np.arange(6, dtype=np.float64).reshape(1, 2, 3)


ARRAYS: dict[str, tuple[object, np.ndarray]] = {
    "float32": (np.arange(6, dtype="f4").reshape(1, 2, 3), np.arange(6, dtype="f4").reshape(1, 2, 3)),
    "float16-batch": (np.ones((2, 1, 2, 3), "f2"), np.ones((2, 1, 2, 3), "f2")),
    "big-endian": (np.arange(6, dtype=">f8").reshape(1, 2, 3), np.arange(6, dtype="<f8").reshape(1, 2, 3)),
    "transposed": (np.arange(6, dtype="f4").reshape(3, 2, 1).T, np.arange(6, dtype="f4").reshape(3, 2, 1).T),
    "torch": (torch.ones(1, 2, 3, requires_grad=True), np.ones((1, 2, 3), "f4")),
    "bfloat16": (torch.ones(1, 2, 3, dtype=torch.bfloat16), np.ones((1, 2, 3), "f4")),
    "foreign": (Foreign(), np.arange(6, dtype="f8").reshape(1, 2, 3)),
}


@pytest.mark.parametrize(("array", "expected"), ARRAYS.values(), ids=ARRAYS.keys())
def test_a_baseline_may_be_any_floating_array(array: object, expected: np.ndarray) -> None:
    methods = [
        sidelight.IntegratedGradients(baseline=array),
        sidelight.Occlusion(baseline=array),
        sidelight.SmoothGrad(base=sidelight.IntegratedGradients(baseline=array)),
        sidelight.ExpectedGradients(baselines=array),
    ]
    for method in methods:
        message = method.message()
        assert given_tensor(message).data == expected.astype(expected.dtype.newbyteorder("<")).tobytes()
        sent = given_array(message)
        assert sent.dtype == expected.dtype
        np.testing.assert_array_equal(sent, expected)


def test_methods_without_an_array_have_none_to_remember() -> None:
    for method, _ in MESSAGES.values():
        if not (isinstance(method, sidelight.ExpectedGradients) and method.baselines is not None):
            assert given_array(method.message()) is None


REFUSED: dict[str, tuple[Callable[[], sidelight.methods.Method], str]] = {
    "signed-and-squared": (
        lambda: sidelight.Gradient(signed=True, squared=True),
        "method.squared: got True together with signed",
    ),
    "flag": (lambda: sidelight.Gradient(times_input=1), "method.times_input: got 1, expected True or False"),
    "fraction": (lambda: sidelight.IntegratedGradients(steps=2.5), "method.steps: got 2.5, expected a whole number"),
    "truth": (lambda: sidelight.IntegratedGradients(steps=True), "method.steps: got True, expected a whole number"),
    "text": (lambda: sidelight.SmoothGrad(samples="25"), "method.samples: got '25', expected a whole number"),
    "array": (lambda: sidelight.RISE(masks=np.ones(3)), "method.masks: got ndarray, expected a whole number"),
    "beyond-32-bits": (lambda: sidelight.RISE(masks=2**31), "method.masks: got 2147483648, expected a 32-bit number"),
    "beyond-64-bits": (lambda: sidelight.RISE(seed=2**63), "method.seed: got 9223372036854775808, expected a 64-bit"),
    "beyond-doubles": (
        lambda: sidelight.SmoothGrad(noise_level=10**400),
        "method.noise_level: got a whole number too large for a float",
    ),
    "no-number": (lambda: sidelight.SmoothGrad(noise_level=None), "method.noise_level: got None, expected a number"),
    "complex": (lambda: sidelight.SmoothGrad(tolerance=1j), "method.tolerance: got complex, expected a number"),
    "tolerance-of-zero": (lambda: sidelight.SmoothGrad(tolerance=0), "method.tolerance: got 0, expected more than 0"),
    "rows-of-zero": (lambda: sidelight.IntegratedGradients(max_rows=0), "method.max_rows: got 0, expected at least 1"),
    "stride-of-zero": (lambda: sidelight.Occlusion(stride=(4, 0)), "method.stride: got 0, expected at least 1"),
    "three-sides": (
        lambda: sidelight.Occlusion(window=(1, 2, 3)),
        "method.window: got (1, 2, 3), expected a number or",
    ),
    "statistic": (
        lambda: sidelight.SmoothGrad(statistic="median"),
        "method.statistic: got 'median', expected one of mean, mean_square, variance",
    ),
    "rule": (
        lambda: sidelight.IntegratedGradients(rule="simpson"),
        "method.rule: got 'simpson', expected one of gauss_legendre, midpoint, trapezoid",
    ),
    "base": (lambda: sidelight.SmoothGrad(base=sidelight.RISE()), "method.base: got RISE, expected Gradient() or"),
    "base-in-the-base": (
        lambda: sidelight.SmoothGrad(base=sidelight.SmoothGrad()),
        "method.base: got SmoothGrad, expected Gradient() or IntegratedGradients()",
    ),
    "layer": (lambda: sidelight.GradCAM(layer=4), "method.layer: got 4, expected a string"),
    "layer-that-is-no-unicode": (lambda: sidelight.GradCAM(layer="\udcff"), "expected a string that UTF-8 can encode"),
    "baseline-name": (
        lambda: sidelight.IntegratedGradients(baseline="blured"),
        "method.baseline: got 'blured', expected zero, black, mean_color, blurred, a number, Blurred() or a floating "
        "array [C, H, W] or [N, C, H, W]; did you mean 'blurred'?",
    ),
    "baseline-truth": (lambda: sidelight.Occlusion(baseline=True), "method.baseline: got True, expected a number"),
    "baseline-none": (lambda: sidelight.Occlusion(baseline=None), "method.baseline: got None, expected zero, black"),
    "baseline-list": (lambda: sidelight.Occlusion(baseline=[0.0]), "method.baseline: got list, expected zero, black"),
    "baseline-pixels": (
        lambda: sidelight.Occlusion(baseline=np.zeros((3, 4, 4), np.uint8)),
        "method.baseline: got uint8 of [3, 4, 4], expected zero, black",
    ),
    "baselines-text": (
        lambda: sidelight.ExpectedGradients(baselines="zero"),
        "method.baselines: got 'zero', expected None or a floating array [M, C, H, W]",
    ),
    "sparse": (
        lambda: sidelight.IntegratedGradients(baseline=torch.eye(3).to_sparse()),
        "method.baseline: got a tensor of torch.float32, expected a dense one",
    ),
    "sigma": (
        lambda: sidelight.Occlusion(baseline=sidelight.Blurred("3")),
        "method.baseline.sigma: got '3', expected a",
    ),
}


@pytest.mark.parametrize(("method", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_value_that_its_message_cannot_hold_is_refused_with_field_got_and_expected(
    method: Callable[[], sidelight.methods.Method], message: str
) -> None:
    with pytest.raises(sidelight.InvalidArgument) as caught:
        method().message()
    assert message in caught.value.message


@pytest.mark.parametrize(
    "method",
    [
        sidelight.IntegratedGradients(steps=0),
        sidelight.SmoothGrad(samples=-3, noise_level=-0.1, max_rows=-1),
        sidelight.SmoothGrad(noise_level=math.nan, tolerance=7.0),
        sidelight.IntegratedGradients(tolerance=-0.5, rule="midpoint", baseline=math.inf),
        sidelight.Occlusion(window=0, stride=-1),
        sidelight.RISE(keep_probability=2.0, cells=0),
    ],
    ids=lambda each: type(each).__name__,
)
def test_the_client_leaves_the_range_of_a_number_to_the_server(method: sidelight.methods.Method) -> None:
    assert method.message().WhichOneof("method")


TARGETS: dict[str, tuple[object, pb.Target, str]] = {
    "predicted": (None, pb.Target(predicted=pb.PredictedTarget()), "predicted"),
    "index": (3, pb.Target(index=3), "index 3"),
    "label": ("tabby", pb.Target(label="tabby"), 'label "tabby"'),
    "list": (
        [3, "tabby"],
        pb.Target(per_example=pb.PerExampleTarget(classes=[pb.ClassChoice(index=3), pb.ClassChoice(label="tabby")])),
        'per example: 3, "tabby"',
    ),
    "top-k": (sidelight.TopK(5), pb.Target(top_k=pb.TopKTarget(k=5)), "top 5"),
    "top-none": (sidelight.TopK(0), pb.Target(top_k=pb.TopKTarget()), "top 0"),
    "contrast": (
        sidelight.Contrast("tabby", np.int64(4)),
        pb.Target(contrast=pb.ContrastTarget(positive=pb.ClassChoice(label="tabby"), negative=pb.ClassChoice(index=4))),
        '"tabby" against 4',
    ),
    "dense": (
        sidelight.Dense(0),
        pb.Target(dense=pb.DenseTarget(choice=pb.ClassChoice(index=0))),
        "dense 0 over all of the output",
    ),
    "dense, of each pixel": (
        sidelight.Dense(),
        pb.Target(dense=pb.DenseTarget()),
        "dense of each pixel's largest output over all of the output",
    ),
    "region": (
        sidelight.Dense("road", region=(1, 2, 3, 4)),
        pb.Target(
            dense=pb.DenseTarget(
                choice=pb.ClassChoice(label="road"), region=tensor_pb2.Box(top=1, left=2, height=3, width=4)
            )
        ),
        'dense "road" over 3 × 4 at 1, 2',
    ),
}


@pytest.mark.parametrize(("target", "message", "text"), TARGETS.values(), ids=TARGETS.keys())
def test_a_target_becomes_its_message(target: object, message: pb.Target, text: str) -> None:
    assert target_message(target) == message
    assert target_message(target).WhichOneof("target") == message.WhichOneof("target")
    assert target_text(message) == text


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (sidelight.TopK("5"), "target.k: got '5', expected a whole number"),
        (sidelight.TopK(2**31), "target.k: got 2147483648, expected a 32-bit number"),
        (sidelight.Contrast(1, None), "target.negative: got None, expected class indices or labels"),
        (sidelight.Contrast(1.5, 2), "target.positive: got 1.5, expected class indices or labels"),
        (sidelight.Contrast(2**63, 2), "target.positive: got 9223372036854775808, expected a 64-bit number"),
        (sidelight.Dense(1.5), "target.label_or_index: got 1.5, expected class indices or labels"),
        (sidelight.Dense(1, (1, 2, 3)), "target.region: got (1, 2, 3), expected (top, left, height, width)"),
        (sidelight.Dense(1, (1, 2, 3, 4.5)), "target.region: got 4.5, expected a whole number"),
        ("\udcff", "target: got '\\udcff', expected a string that UTF-8 can encode"),
        (True, "target: got True, expected a whole number"),
    ],
    ids=lambda each: "" if isinstance(each, str) else repr(each),
)
def test_a_target_that_its_message_cannot_hold_is_refused(target: object, message: str) -> None:
    with pytest.raises(sidelight.InvalidArgument) as caught:
        target_message(target)
    assert message in caught.value.message
