"""Methods: converts method messages to methods and back, field by field as in the schema.

A message's field is the parameter of the same name of the method class whose `name` is the field of `Method`. A field
`…_height` is, with its `…_width`, one parameter of two numbers.
"""

import enum
from typing import Any

import numpy as np
from google.protobuf.message import Message
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..domain import Array
from ..errors import InvalidArgument
from ..methods import METHODS, Gradient, IntegratedGradients, Method
from ..methods.baseline import Baseline, Black, Blurred, Constant, Given, MeanColor
from ..methods.channels import Magnitude
from ..methods.integrated_gradients import Rule
from ..methods.smoothgrad import Statistic
from .enums import meaning, number_of, numbers
from .tensors import DTYPES, floats_of

_BY_NAME = {each.name: each for each in METHODS}
CLASSES = {name: _BY_NAME[name] for name in pb.Method.DESCRIPTOR.fields_by_name if name in _BY_NAME}
SERVED_METHODS = tuple(CLASSES)
OPTIONAL = ("tolerance", "max_rows")  # numbers of which 0 means unset, and the class has a default

ENUMS: dict[str, tuple[Any, type[enum.Enum]]] = {  # by the parameter
    "magnitude": (pb.Magnitude, Magnitude),
    "rule": (pb.PathRule, Rule),
    "statistic": (pb.SmoothGradMethod.Statistic, Statistic),
}


def parse_method(method: pb.Method) -> Method:
    """Return the method of a message. Raises `InvalidArgument`, naming the field, the value and what was expected."""
    chosen = method.WhichOneof("method")
    if chosen is None:
        raise InvalidArgument(f"method: unset, or newer than this server; it serves {', '.join(SERVED_METHODS)}")
    message = getattr(method, chosen)
    parameters = {}
    for name in message.DESCRIPTOR.fields_by_name:
        if not name.endswith("_width") and (value := _parameter(message, name, chosen)) is not None:
            parameters[name.removesuffix("_height")] = value
    if "stride" in parameters:  # 0: the window's own size
        parameters["stride"] = tuple(
            step or size for step, size in zip(parameters["stride"], parameters["window"], strict=True)
        )
    if chosen == IntegratedGradients.name and message.tolerance:
        parameters.setdefault("rule", Rule.TRAPEZOID)  # which alone can be refined
    return CLASSES[chosen](**parameters)


def method_message(method: Method) -> pb.Method:
    """Return a method's message with all defaults filled in. Baseline tensors are without their data."""
    chosen = getattr(pb.Method(), method.name)
    fields = {name: _field_value(method, name) for name in chosen.DESCRIPTOR.fields_by_name}
    return pb.Method(**{method.name: type(chosen)(**fields)})


def _parameter(message: Message, name: str, method: str) -> Any:
    """Return the parameter of a field; None where it is unset, so that the class's default holds."""
    value, field = getattr(message, name), f"method.{method}.{name}"
    if name.endswith("_height"):
        return value, getattr(message, name.replace("_height", "_width"))
    if name in ENUMS:
        wire, domain = ENUMS[name]
        return meaning(value, numbers(wire, domain), field, wire, unset=None)
    if name in OPTIONAL:
        return value or None
    match value:
        case pb.Baseline():
            return _baseline(value)
        case pb.Method():
            return _base(value, field)
        case tensor_pb2.Tensor():
            return floats_of(value, field=field) if message.HasField(name) else None
        case _:
            return value


def _field_value(method: Method, name: str) -> Any:
    for index, side in enumerate(("_height", "_width")):
        if name.endswith(side):
            sides = getattr(method, name.removesuffix(side)) or method.window  # type: ignore[attr-defined]
            return sides[index]
    value = getattr(method, name)
    if name in ENUMS:
        return number_of(numbers(*ENUMS[name]), value)
    match value:
        case Constant() | Black() | MeanColor() | Blurred() | Given():
            return _baseline_message(value)
        case Method():
            return method_message(value)
        case np.ndarray():
            return _without_data(value)
        case _:
            return value


def _base(message: pb.Method, field: str) -> Method | None:
    chosen = message.WhichOneof("method")
    # Checked before parsing: recursive bases would exhaust the stack.
    if chosen not in (None, Gradient.name, IntegratedGradients.name):
        raise InvalidArgument(f"{field}: {chosen}, expected gradient or integrated_gradients")
    return parse_method(message) if chosen else None


def _baseline(message: pb.Baseline) -> Baseline | None:
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
            return None


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
