"""Methods and targets of the client: their messages, their text in both directions, and invalid ones."""

import contextlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import sidelight
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sidelight._inputs.targets import target_message, target_text
from sidelight.methods.baselines import given_array, given_tensor
from sidelight.methods.parsing import METHODS, method_text, parse_method
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from support.profiles import n_examples

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
def test_a_method_says_itself_with_every_default(method: sidelight.methods.Method, message: pb.Method) -> None:
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
def test_what_the_wire_cannot_hold_is_refused_by_field_got_and_expected(
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
def test_a_number_out_of_its_range_goes_to_the_server_which_knows_the_range(method: sidelight.methods.Method) -> None:
    method.message()


wholes = st.integers(-(2**31), 2**31 - 1)
seeds = st.integers(-(2**63), 2**63 - 1)
reals = st.floats(allow_nan=False, allow_infinity=False)
counts = wholes.filter(bool)
tolerances = st.none() | reals.filter(bool)
unicode = st.text(st.characters(exclude_categories=["Cs"]))
layers = unicode | st.from_regex(r"[a-z0-9]{1,6}(\.[a-z0-9]{1,6}){0,3}", fullmatch=True)
baselines = (
    st.sampled_from(["zero", "black", "mean_color", "blurred"]) | reals | st.builds(sidelight.Blurred, sigma=reals)
)
gradients = st.builds(
    sidelight.Gradient, signed=st.booleans(), times_input=st.booleans(), squared=st.booleans()
).filter(lambda each: not (each.signed and each.squared))
paths = st.builds(
    sidelight.IntegratedGradients,
    steps=wholes,
    rule=st.sampled_from([None, "gauss_legendre", "midpoint", "trapezoid"]),
    baseline=baselines,
    tolerance=tolerances,
    max_rows=counts,
)
methods = st.one_of(
    gradients,
    paths,
    st.builds(
        sidelight.SmoothGrad,
        samples=wholes,
        noise_level=reals,
        seed=seeds,
        absolute_noise=st.booleans(),
        statistic=st.sampled_from(["mean", "mean_square", "variance"]),
        tolerance=tolerances,
        max_rows=counts,
        base=gradients | paths,
    ),
    st.builds(sidelight.ExpectedGradients, samples=wholes, baselines=st.none(), noise_level=reals, seed=seeds),
    st.builds(sidelight.GradCAM, layer=layers, keep_negative=st.booleans()),
    st.builds(sidelight.LayerGradientXActivation, layer=layers),
    st.builds(
        sidelight.Occlusion,
        window=wholes | st.tuples(wholes, wholes),
        stride=counts | st.tuples(counts, counts),
        baseline=baselines,
    ),
    st.builds(sidelight.RISE, masks=wholes, cells=wholes, keep_probability=reals, seed=seeds),
    st.just(sidelight.GuidedBackpropagation()),
)


@settings(max_examples=n_examples(400))
@given(method=methods)
def test_the_text_of_a_method_makes_the_same_message_again(method: sidelight.methods.Method) -> None:
    message = method.message()
    again = parse_method(method_text(message)).message()
    assert again.SerializeToString(deterministic=True) == message.SerializeToString(deterministic=True)


TEXTS: dict[str, sidelight.methods.Method] = {
    "gradient(signed=False, times_input=False, squared=False)": sidelight.Gradient(),
    "integrated_gradients(steps=50, rule=gauss_legendre, baseline=zero, max_rows=300)": sidelight.IntegratedGradients(),
    "integrated_gradients(rule=trapezoid, baseline=0.5, tolerance=0.05, max_rows=300)": sidelight.IntegratedGradients(
        tolerance=0.05, baseline=0.5
    ),
    "smoothgrad(samples=25, noise_level=0.15, absolute_noise=False, seed=0, statistic=mean, max_rows=300, "
    "base=gradient(signed=True, times_input=False, squared=False))": sidelight.SmoothGrad(
        base=sidelight.Gradient(signed=True)
    ),
    "expected_gradients(samples=50, baselines=None, noise_level=0.0, seed=0)": sidelight.ExpectedGradients(),
    "grad_cam(layer=layer4.1.conv2, keep_negative=False)": sidelight.GradCAM("layer4.1.conv2"),
    "grad_cam(layer=7, keep_negative=True)": sidelight.GradCAM("7", keep_negative=True),
    "layer_gradient_x_activation(layer='')": sidelight.LayerGradientXActivation(),
    "occlusion(window=(16, 16), stride=(16, 16), baseline=blurred(sigma=10.0))": sidelight.Occlusion(
        baseline="blurred"
    ),
    "rise(masks=1000, cells=7, keep_probability=0.5, seed=0)": sidelight.RISE(),
    "guided_backpropagation": sidelight.GuidedBackpropagation(),
}


@pytest.mark.parametrize(("text", "method"), TEXTS.items(), ids=[text.partition("(")[0] for text in TEXTS])
def test_a_method_is_printed_with_every_option_that_counts(text: str, method: sidelight.methods.Method) -> None:
    assert method_text(method.message()) == text


def test_a_given_array_is_printed_as_an_array() -> None:
    array = np.zeros((1, 2, 3), np.float32)
    assert "baseline=tensor" in method_text(sidelight.IntegratedGradients(baseline=array).message())
    assert "baselines=tensor" in method_text(sidelight.ExpectedGradients(baselines=array[None]).message())
    assert method_text(pb.Method()) == ""


READ: dict[str, sidelight.methods.Method] = {
    "gradient": sidelight.Gradient(),
    " gradient () ": sidelight.Gradient(),
    "gradient(times_input=True,)": sidelight.Gradient(times_input=True),
    "smoothgrad(samples=10, base=integrated_gradients(steps=20))": sidelight.SmoothGrad(
        samples=10, base=sidelight.IntegratedGradients(steps=20)
    ),
    "smoothgrad(base=gradient)": sidelight.SmoothGrad(),
    "integrated_gradients(tolerance=5e-2, rule=None)": sidelight.IntegratedGradients(tolerance=0.05),
    "integrated_gradients(baseline='mean_color')": sidelight.IntegratedGradients(baseline="mean_color"),
    "integrated_gradients(baseline=-.5)": sidelight.IntegratedGradients(baseline=-0.5),
    "occlusion(window=(3, 4), baseline=blurred)": sidelight.Occlusion(window=(3, 4), baseline="blurred"),
    "occlusion(baseline=blurred(sigma=1.5e+1))": sidelight.Occlusion(baseline=sidelight.Blurred(15.0)),
    "grad_cam(layer=layer4)": sidelight.GradCAM("layer4"),
    "grad_cam(layer=features.8.0.conv-1)": sidelight.GradCAM("features.8.0.conv-1"),
    "grad_cam(layer=4.conv)": sidelight.GradCAM("4.conv"),
    "grad_cam( layer = 7 )": sidelight.GradCAM("7"),
    "grad_cam(layer=1.10)": sidelight.GradCAM("1.10"),  # no number: the layer "1.1" is another
    "grad_cam(layer=None)": sidelight.GradCAM("None"),
    """grad_cam(layer="it's 'a' (layer=x)")""": sidelight.GradCAM("it's 'a' (layer=x)"),
}


@pytest.mark.parametrize(("text", "method"), READ.items(), ids=READ.keys())
def test_a_method_is_read_as_a_person_writes_it(text: str, method: sidelight.methods.Method) -> None:
    assert parse_method(text).message() == method.message()


WRONG = {
    "smothgrad": "method: got 'smothgrad', expected one of gradient, smoothgrad, integrated_gradients,",
    "SmoothGrad": "did you mean 'smoothgrad'?",
    "smoothgrad(sample=3)": "method: smoothgrad got the option 'sample', expected one of samples, noise_level, seed",
    "integrated_gradients(step=3)": "did you mean 'steps'?",
    "smoothgrad(base=smothgrad)": "method.base: got 'smothgrad', expected one of gradient, smoothgrad",
    "smoothgrad(base=rise)": "method.base: got RISE, expected Gradient() or IntegratedGradients()",
    "rise(seed=1, seed=2)": "method: rise got the option 'seed' twice",
    "rise(100)": "method: got rise(100), expected a name with named options",
    "rise(**x)": "method: rise got the option '**', expected one of masks, cells",
    "guided_backpropagation(x=1)": "method: guided_backpropagation got the option 'x', expected none",
    "rise(masks=many)": "method.masks: got 'many', expected a whole number",
    "rise(masks=1 + 1)": "expected something like",
    "rise(masks=not seed)": "method.masks: got 'not'('seed'), expected a number, a word or a quoted string",
    "grad_cam(layer=layer4 conv)": "method.layer: got 'layer4'('conv'), expected a number, a word or a quoted string",
    "grad_cam(layer='a' 'b')": "method.layer: got 'a'('b'), expected a number, a word or a quoted string",
    "rise(masks=(seed)(1))": "method.masks: got 'seed'(1), expected a number, a word or a quoted string",
    "rise(masks=[1])": "method.masks: got list, expected a whole number",
    "occlusion(baseline=blured(sigma=1))": "method.baseline: got 'blured', expected one of blurred; did you mean",
    "occlusion(baseline=gradient(signed=True))": "method.baseline: got 'gradient', expected one of blurred",
    "occlusion(baseline=tensor)": "method.baseline: got 'tensor', expected zero, black",
    "": "got '', expected something like integrated_gradients(steps=50)",
    "rise(": "got 'rise(', expected something like integrated_gradients(steps=50)",
    "rise(masks=": "expected something like",
    "a\x00b": "expected something like",
    "1": "method: got 1, expected a name with named options",
    "rise.x(masks=1)": "expected a name with named options",
    "__import__('os').system('true')": "expected a name with named options",
    "rise(masks=__import__('os'))": "method.masks: got __import__('os'), expected a number, a word or a quoted string",
    "(" * 10_000: "expected something like",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=[repr(text[:40]) for text in WRONG])
def test_a_text_that_is_no_method_is_refused_with_what_is_near(text: str, message: str) -> None:
    with pytest.raises(sidelight.InvalidArgument) as caught:
        parse_method(text)
    assert message in caught.value.message


@settings(max_examples=n_examples(300))
@given(text=unicode | st.text("risegradnt()=,'\"0123456789. -*layer_\\"))
def test_no_text_is_more_than_a_method_or_an_invalid_argument(text: str) -> None:
    with contextlib.suppress(sidelight.InvalidArgument):
        assert isinstance(parse_method(text), sidelight.methods.Method)


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
def test_a_target_says_itself(target: object, message: pb.Target, text: str) -> None:
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
def test_a_target_that_the_wire_cannot_hold_is_refused(target: object, message: str) -> None:
    with pytest.raises(sidelight.InvalidArgument) as caught:
        target_message(target)
    assert message in caught.value.message
