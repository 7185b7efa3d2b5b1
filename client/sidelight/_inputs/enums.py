"""Enum values as strings: `SCORE_LOG_PROBABILITY` is "log_probability"."""

import functools
from typing import Literal, Protocol, TypeVar, get_args

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from ..exceptions import InvalidArgument
from .validation import summary

Score = Literal["probability", "logit", "log_probability", "margin"]
Channels = Literal["max_abs", "sum", "mean_abs", "l2", "none"]
MapDtype = Literal["float32", "float16", "uint8"]
Statistic = Literal["mean", "mean_square", "variance"]
Rule = Literal["gauss_legendre", "midpoint", "trapezoid"]

_Number = TypeVar("_Number", bound=int)


class Enum(Protocol[_Number]):
    """A generated enum. Its first name ends in `_UNSPECIFIED`."""

    def Name(self, number: _Number) -> str: ...  # noqa: N802
    def Value(self, name: str) -> _Number: ...  # noqa: N802
    def keys(self) -> list[str]: ...
    def values(self) -> list[_Number]: ...
    def __hash__(self) -> int: ...


def score_number(score: Score) -> model_pb2.Score.ValueType:
    """Return the enum number of a score."""
    return _number(model_pb2.Score, score, get_args(Score), "score")


def channels_number(channels: Channels) -> pb.ChannelReduction.ValueType:
    """Return the enum number of a channel reduction."""
    return _number(pb.ChannelReduction, channels, get_args(Channels), "channels")


def map_dtype_number(map_dtype: str) -> tensor_pb2.DataType.ValueType:
    """Return the enum number of a map's data type."""
    return _number(tensor_pb2.DataType, map_dtype, get_args(MapDtype), "map_dtype")


def statistic_number(statistic: Statistic) -> pb.SmoothGradMethod.Statistic.ValueType:
    """Return the enum number of a SmoothGrad statistic."""
    return _number(pb.SmoothGradMethod.Statistic, statistic, get_args(Statistic), "method.statistic")


def rule_number(rule: Rule) -> pb.PathRule.ValueType:
    """Return the enum number of a quadrature rule."""
    return _number(pb.PathRule, rule, get_args(Rule), "method.rule")


def word(enum: Enum[_Number], number: int) -> str:
    """Return the string for an enum number; an unknown number is returned as its digits."""
    return _words(enum).get(number, str(number))


def _number(enum: Enum[_Number], given: object, words: tuple[str, ...], field: str) -> _Number:
    if not isinstance(given, str) or given not in words:
        raise InvalidArgument(f"{field}: got {summary(given)}, expected one of {', '.join(words)}")
    return enum.Value(_prefix(enum) + given.upper())


@functools.cache
def _words(enum: Enum[int]) -> dict[int, str]:
    return {number: enum.Name(number).removeprefix(_prefix(enum)).lower() for number in enum.values()}


@functools.cache
def _prefix(enum: Enum[int]) -> str:
    return enum.keys()[0].removesuffix("UNSPECIFIED")
