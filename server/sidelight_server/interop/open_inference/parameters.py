"""Parameters: names in `parameters` of the protocol's messages, checked and converted."""

from collections.abc import Mapping

from google.protobuf.duration_pb2 import Duration
from sidelight import exceptions
from sidelight._inputs.enums import Channels, MapDtype, Score, enum_number
from sidelight._inputs.targets import target_message
from sidelight.methods.parsing import parse_method
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from ...errors import InvalidArgument, did_you_mean
from . import inference_pb2 as oip

PREFIX = "sidelight_"
NAMES = tuple(PREFIX + name for name in ("method", "target", "score", "channels", "map_dtype"))

Parameters = Mapping[str, oip.InferParameter]


def fill_in(message: pb.AttributeRequest, parameters: Parameters) -> None:
    """Set the fields of a message that are parameters here; unset ones have the defaults of the Python client.

    Of names without the prefix `sidelight_` only `timeout` is read: others are Triton's own, or for other models.
    Raises `InvalidArgument`, which names the parameter.
    """
    for name in parameters:
        if name.startswith(PREFIX) and name not in NAMES:
            raise InvalidArgument(f'parameters: "{name}" is unknown; {did_you_mean(name, NAMES)}')
    try:
        message.method.CopyFrom(parse_method(_text(parameters, "method", "gradient")).message())
        message.score = enum_number(model_pb2.Score, _text(parameters, "score", "probability"), Score, "score")
        channels, map_dtype = _text(parameters, "channels", "max_abs"), _text(parameters, "map_dtype", "float32")
        message.channels = enum_number(pb.ChannelReduction, channels, Channels, "channels")
        message.output.map_dtype = enum_number(tensor_pb2.DataType, map_dtype, MapDtype, "map_dtype")
    except exceptions.InvalidArgument as error:
        raise InvalidArgument(f"parameters.{PREFIX}{error.message}") from None
    message.target.CopyFrom(_target(parameters))
    if timeout_us := integer(parameters, "timeout", field="parameters"):
        message.timeout.CopyFrom(_microseconds(timeout_us))


def integer(parameters: Parameters, name: str, *, field: str) -> int:
    """Return an integer parameter; 0 if it is not given. Raises `InvalidArgument` for another type."""
    if name not in parameters:
        return 0
    match parameters[name].WhichOneof("parameter_choice"):
        case "int64_param":
            return parameters[name].int64_param
        case "uint64_param":
            return parameters[name].uint64_param
        case other:
            raise InvalidArgument(f"{field}.{name}: got {other or 'nothing'}, expected int64_param")


def string(parameters: Parameters, name: str, *, field: str) -> str:
    """Return a text parameter; empty if it is not given. Raises `InvalidArgument` for another type."""
    if name not in parameters:
        return ""
    if (kind := parameters[name].WhichOneof("parameter_choice")) != "string_param":
        raise InvalidArgument(f"{field}.{name}: got {kind or 'nothing'}, expected string_param")
    return parameters[name].string_param


def _text(parameters: Parameters, name: str, default: str) -> str:
    return string(parameters, PREFIX + name, field="parameters") or default


def _target(parameters: Parameters) -> pb.Target:
    """Return the target: a class index or label, indices separated by commas for one per example, or the predicted."""
    name = PREFIX + "target"
    if name in parameters and parameters[name].WhichOneof("parameter_choice") == "int64_param":
        return target_message(parameters[name].int64_param)
    text = string(parameters, name, field="parameters")
    if not text:
        return target_message(None)
    numbers = text.split(",")
    if not all(number.strip().removeprefix("-").isdecimal() for number in numbers):
        return target_message(text)
    try:
        return target_message(int(text) if len(numbers) == 1 else [int(number) for number in numbers])
    except (exceptions.InvalidArgument, ValueError):
        raise InvalidArgument(f"parameters.{name}: got {text[:64]!r}, expected class indices within int64") from None


def _microseconds(timeout_us: int) -> Duration:
    seconds, rest_us = divmod(timeout_us, 1_000_000)
    return Duration(seconds=min(seconds, 10**9), nanos=rest_us * 1000)  # a negative one is rejected with the message
