"""Enum values as strings: `SCORE_LOG_PROBABILITY` is "log_probability"."""

import functools
from typing import Literal, Protocol, TypeVar, get_args

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


def enum_number(enum: Enum[_Number], given: object, words: object, field: str) -> _Number:
    """Return the enum number of a string, which must be one of a `Literal` type."""
    known = get_args(words)
    if not isinstance(given, str) or given not in known:
        raise InvalidArgument(f"{field}: got {summary(given)}, expected one of {', '.join(known)}")
    return enum.Value(_prefix(enum) + given.upper())


def word(enum: Enum[_Number], value: int) -> str:
    """Return the string for an enum number; an unknown number as digits."""
    return _words(enum).get(value, str(value))


@functools.cache
def _words(enum: Enum[int]) -> dict[int, str]:
    return {value: enum.Name(value).removeprefix(_prefix(enum)).lower() for value in enum.values()}


@functools.cache
def _prefix(enum: Enum[int]) -> str:
    return enum.keys()[0].removesuffix("UNSPECIFIED")
