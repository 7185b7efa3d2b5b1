"""The text of a method, in both directions."""

import contextlib

import numpy as np
import pytest
import sidelight
from hypothesis import given, settings
from hypothesis import strategies as st
from sidelight.methods.parsing import method_text, parse_method
from sidelight.v1 import attribution_pb2 as pb

from support.profiles import n_examples

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
def test_a_method_text_may_be_written_in_several_ways(text: str, method: sidelight.methods.Method) -> None:
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
def test_an_invalid_method_text_is_refused_with_a_similar_name(text: str, message: str) -> None:
    with pytest.raises(sidelight.InvalidArgument) as caught:
        parse_method(text)
    assert message in caught.value.message


@settings(max_examples=n_examples(300))
@given(text=unicode | st.text("risegradnt()=,'\"0123456789. -*layer_\\"))
def test_no_text_is_more_than_a_method_or_an_invalid_argument(text: str) -> None:
    with contextlib.suppress(sidelight.InvalidArgument):
        assert isinstance(parse_method(text), sidelight.methods.Method)
