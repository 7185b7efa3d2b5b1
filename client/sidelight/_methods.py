"""Methods and targets: what a caller asks for, and the messages that say it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2

from ._errors import InvalidArgument

Score = Literal["probability", "logit", "log_probability", "margin"]
Channels = Literal["max_abs", "sum", "mean_abs", "l2", "none"]
Choice = int | str
Target = Choice | Sequence[Choice] | None


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradient of the score at the example.

    Simonyan, Vedaldi and Zisserman, 2013, "Deep Inside Convolutional Networks". `signed` keeps the sign when channels
    are reduced; `times_input` multiplies by the model's input (Shrikumar, Greenside and Kundaje, 2016, "Not Just a
    Black Box").
    """

    signed: bool = False
    times_input: bool = False

    def message(self) -> pb.Method:
        """Return what goes over the wire, every default filled in."""
        magnitude = pb.MAGNITUDE_SIGNED if self.signed else pb.MAGNITUDE_ABSOLUTE
        return pb.Method(gradient=pb.GradientMethod(magnitude=magnitude, times_input=self.times_input))


Method = Gradient

_SCORES: dict[str, model_pb2.Score.ValueType] = {
    "probability": model_pb2.SCORE_PROBABILITY,
    "logit": model_pb2.SCORE_LOGIT,
    "log_probability": model_pb2.SCORE_LOG_PROBABILITY,
    "margin": model_pb2.SCORE_MARGIN,
}
_CHANNELS: dict[str, pb.ChannelReduction.ValueType] = {
    "max_abs": pb.CHANNEL_REDUCTION_MAX_ABS,
    "sum": pb.CHANNEL_REDUCTION_SUM,
    "mean_abs": pb.CHANNEL_REDUCTION_MEAN_ABS,
    "l2": pb.CHANNEL_REDUCTION_L2,
    "none": pb.CHANNEL_REDUCTION_NONE,
}


def score_message(score: Score) -> model_pb2.Score.ValueType:
    """Return a score's number on the wire."""
    if score not in _SCORES:
        raise InvalidArgument(f"score: got {score!r}, expected one of {', '.join(_SCORES)}")
    return _SCORES[score]


def channels_message(channels: Channels) -> pb.ChannelReduction.ValueType:
    """Return a reduction's number on the wire."""
    if channels not in _CHANNELS:
        raise InvalidArgument(f"channels: got {channels!r}, expected one of {', '.join(_CHANNELS)}")
    return _CHANNELS[channels]


def score_name(number: int) -> str:
    """Return the name of a score's number."""
    return next((name for name, each in _SCORES.items() if each == number), str(number))


def channels_name(number: int) -> str:
    """Return the name of a reduction's number."""
    return next((name for name, each in _CHANNELS.items() if each == number), str(number))


def target_message(target: Target) -> pb.Target:
    """Return the message of a target: None is the predicted class, a sequence has one class for each example."""
    if to_list := getattr(target, "tolist", None):  # an array or a tensor, of any rank
        target = to_list()
    if target is None:
        return pb.Target(predicted=pb.PredictedTarget())
    if isinstance(target, str):
        return pb.Target(label=target)
    if isinstance(target, int | np.integer):
        return pb.Target(index=_index(target))
    if isinstance(target, Sequence):
        return pb.Target(per_example=pb.PerExampleTarget(classes=[_choice_message(each) for each in target]))
    raise InvalidArgument(
        f"target: got {type(target).__name__}, expected None, a class index, a label or a list of them"
    )


def _choice_message(choice: object) -> pb.ClassChoice:
    if isinstance(choice, str):
        return pb.ClassChoice(label=choice)
    if isinstance(choice, int | np.integer):
        return pb.ClassChoice(index=_index(choice))
    raise InvalidArgument(f"target: got {choice!r} in the list, expected class indices or labels")


def _index(index: "int | np.integer[object]") -> int:  # type: ignore[type-var]
    whole = int(index)
    if not -(2**63) <= whole < 2**63:
        raise InvalidArgument(f"target: class index {whole} is no 64-bit number")
    return whole
