"""Methods: converts `Method` messages to methods and back, with every default filled in."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..domain import Array
from ..errors import InvalidArgument
from ..methods import (
    METHODS,
    RISE,
    ExpectedGradients,
    GradCAM,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    LayerGradientXActivation,
    Method,
    Occlusion,
    SmoothGrad,
)
from ..methods.baseline import Baseline, Black, Blurred, Constant, Given, MeanColor
from ..methods.channels import Magnitude
from ..methods.integrated_gradients import Rule
from ..methods.smoothgrad import Statistic
from .enums import meaning, number_of
from .tensors import DTYPES, floats_of

SERVED_METHODS = tuple(each.name for each in METHODS)
DEFAULT_MAX_ROWS = 300

MAGNITUDES: dict[pb.Magnitude.ValueType, Magnitude] = {
    pb.MAGNITUDE_ABSOLUTE: Magnitude.ABSOLUTE,
    pb.MAGNITUDE_SIGNED: Magnitude.SIGNED,
    pb.MAGNITUDE_SQUARED: Magnitude.SQUARED,
}
STATISTICS: dict[pb.SmoothGradMethod.Statistic.ValueType, Statistic] = {
    pb.SmoothGradMethod.STATISTIC_MEAN: Statistic.MEAN,
    pb.SmoothGradMethod.STATISTIC_MEAN_SQUARE: Statistic.MEAN_SQUARE,
    pb.SmoothGradMethod.STATISTIC_VARIANCE: Statistic.VARIANCE,
}
RULES: dict[pb.PathRule.ValueType, Rule] = {
    pb.PATH_RULE_GAUSS_LEGENDRE: Rule.GAUSS_LEGENDRE,
    pb.PATH_RULE_MIDPOINT: Rule.MIDPOINT,
    pb.PATH_RULE_TRAPEZOID: Rule.TRAPEZOID,
}


def parse_method(method: pb.Method) -> Method:
    """Parse a `Method` message. Raises `InvalidArgument`, which names field, value and what was expected."""
    chosen = method.WhichOneof("method")
    if chosen is None:
        raise InvalidArgument(f"method: unset, or newer than this server; it serves {', '.join(SERVED_METHODS)}")
    return _PARSERS[chosen](getattr(method, chosen))


def method_message(method: Method) -> pb.Method:
    """Return a method as a message with every default filled in; baselines given as arrays without their data."""
    match method:
        case GuidedBackpropagation():
            return pb.Method(guided_backpropagation=pb.GuidedBackpropagationMethod())
        case Gradient(magnitude=magnitude, times_input=times_input):
            chosen = pb.GradientMethod(magnitude=number_of(MAGNITUDES, magnitude), times_input=times_input)
            return pb.Method(gradient=chosen)
        case SmoothGrad():
            return pb.Method(smoothgrad=_smoothgrad_message(method))
        case IntegratedGradients():
            return pb.Method(integrated_gradients=_integrated_gradients_message(method))
        case ExpectedGradients(samples=samples, baselines=baselines, noise_level=noise_level, seed=seed):
            given = None if baselines is None else _without_data(baselines)
            drawn = pb.ExpectedGradientsMethod(samples=samples, baselines=given, noise_level=noise_level, seed=seed)
            return pb.Method(expected_gradients=drawn)
        case GradCAM(layer=layer, keep_negative=keep_negative):
            return pb.Method(grad_cam=pb.GradCamMethod(layer=layer, keep_negative=keep_negative))
        case LayerGradientXActivation(layer=layer):
            product = pb.LayerGradientXActivationMethod(layer=layer)
            return pb.Method(layer_gradient_x_activation=product)
        case Occlusion(window=window, stride=stride, baseline=baseline):
            stride = stride or window
            return pb.Method(
                occlusion=pb.OcclusionMethod(
                    window_height=window[0], window_width=window[1], stride_height=stride[0], stride_width=stride[1],
                    baseline=_baseline_message(baseline),
                )
            )  # fmt: skip
        case RISE(masks=masks, cells=cells, keep_probability=keep_probability, seed=seed):
            hidden = pb.RiseMethod(masks=masks, cells=cells, keep_probability=keep_probability, seed=seed)
            return pb.Method(rise=hidden)
        case _:
            raise TypeError(f"{type(method).__name__} has no message")


def _gradient(message: pb.GradientMethod) -> Gradient:
    field = "method.gradient.magnitude"
    magnitude = meaning(message.magnitude, MAGNITUDES, field, pb.Magnitude, unset=Magnitude.ABSOLUTE)
    return Gradient(magnitude, message.times_input)


def _smoothgrad(message: pb.SmoothGradMethod) -> SmoothGrad:
    statistic = message.statistic
    return SmoothGrad(
        samples=message.samples,
        noise_level=message.noise_level,
        absolute_noise=message.absolute_noise,
        seed=message.seed,
        statistic=meaning(
            statistic, STATISTICS, "method.smoothgrad.statistic", pb.SmoothGradMethod.Statistic, unset=Statistic.MEAN
        ),
        tolerance=message.tolerance or None,
        max_rows=message.max_rows or DEFAULT_MAX_ROWS,
        base=_base(message.base),
    )


def _base(message: pb.Method) -> Gradient | IntegratedGradients:
    chosen = message.WhichOneof("method")
    if chosen is None:
        return Gradient()
    # Checked before parsing: deeply nested methods would exhaust the stack.
    if chosen not in ("gradient", "integrated_gradients"):
        raise InvalidArgument(f"method.smoothgrad.base: {chosen}, expected gradient or integrated_gradients")
    base = parse_method(message)
    assert isinstance(base, Gradient | IntegratedGradients)  # noqa: S101
    return base


def _smoothgrad_message(method: SmoothGrad) -> pb.SmoothGradMethod:
    return pb.SmoothGradMethod(
        samples=method.samples,
        noise_level=method.noise_level,
        absolute_noise=method.absolute_noise,
        seed=method.seed,
        statistic=number_of(STATISTICS, method.statistic),
        tolerance=method.tolerance or 0.0,
        max_rows=method.max_rows,
        base=method_message(method.base),
    )


def _integrated_gradients(message: pb.IntegratedGradientsMethod) -> IntegratedGradients:
    unset = Rule.TRAPEZOID if message.tolerance else Rule.GAUSS_LEGENDRE
    return IntegratedGradients(
        steps=message.steps,
        rule=meaning(message.rule, RULES, "method.integrated_gradients.rule", pb.PathRule, unset=unset),
        baseline=_baseline(message.baseline),
        tolerance=message.tolerance or None,
        max_rows=message.max_rows or DEFAULT_MAX_ROWS,
    )


def _integrated_gradients_message(method: IntegratedGradients) -> pb.IntegratedGradientsMethod:
    return pb.IntegratedGradientsMethod(
        steps=method.steps,
        rule=number_of(RULES, method.rule),
        baseline=_baseline_message(method.baseline),
        tolerance=method.tolerance or 0.0,
        max_rows=method.max_rows,
    )


def _expected_gradients(message: pb.ExpectedGradientsMethod) -> ExpectedGradients:
    field = "method.expected_gradients.baselines"
    baselines = floats_of(message.baselines, field=field) if message.HasField("baselines") else None
    return ExpectedGradients(message.samples, baselines, message.noise_level, message.seed)


def _occlusion(message: pb.OcclusionMethod) -> Occlusion:
    window = message.window_height, message.window_width
    stride = message.stride_height or window[0], message.stride_width or window[1]
    return Occlusion(window, stride, _baseline(message.baseline))


def _rise(message: pb.RiseMethod) -> RISE:
    return RISE(message.masks, message.cells, message.keep_probability, message.seed)


_PARSERS: dict[str, Callable[[Any], Method]] = {
    "gradient": _gradient,
    "smoothgrad": _smoothgrad,
    "integrated_gradients": _integrated_gradients,
    "expected_gradients": _expected_gradients,
    "grad_cam": lambda message: GradCAM(message.layer, message.keep_negative),
    "layer_gradient_x_activation": lambda message: LayerGradientXActivation(message.layer),
    "occlusion": _occlusion,
    "rise": _rise,
    "guided_backpropagation": lambda _: GuidedBackpropagation(),
}


def _baseline(message: pb.Baseline) -> Baseline:
    match message.WhichOneof("baseline"):
        case "constant":
            return Constant(message.constant)
        case "black":
            return Black()
        case "mean_color":
            return MeanColor()
        case "blurred":
            return Blurred(message.blurred.sigma)
        case "tensor":
            return Given(floats_of(message.tensor, field="method.baseline.tensor"))
        case _:
            return Constant()


def _baseline_message(baseline: Baseline) -> pb.Baseline:
    match baseline:
        case Constant(value):
            return pb.Baseline(constant=value)
        case Black():
            return pb.Baseline(black=pb.BlackBaseline())
        case MeanColor():
            return pb.Baseline(mean_color=pb.MeanColorBaseline())
        case Blurred(sigma):
            return pb.Baseline(blurred=pb.BlurredBaseline(sigma=sigma))
        case Given(array=array):
            return pb.Baseline(tensor=_without_data(array))


def _without_data(array: Array) -> tensor_pb2.Tensor:
    dtype = next((number for number, each in DTYPES.items() if each == array.dtype), tensor_pb2.DATA_TYPE_FLOAT32)
    return tensor_pb2.Tensor(dtype=dtype, shape=np.shape(array))
