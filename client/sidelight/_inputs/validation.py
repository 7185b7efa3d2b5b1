"""Validation: checks that values have types that the schema can represent. The server checks ranges."""

import difflib
from collections.abc import Iterable

import numpy as np

from ..exceptions import InvalidArgument


def whole(value: object, field: str, *, bits: int = 32) -> int:
    """Return the value as an int that fits into a signed number of `bits`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidArgument(f"{field}: got {summary(value)}, expected a whole number")
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise InvalidArgument(f"{field}: got {value}, expected a {bits}-bit number")
    return int(value)


def counted(value: object, field: str) -> int:
    """Return the value as a nonzero int: 0 on the wire means that the field is unset."""
    if number := whole(value, field):
        return number
    raise InvalidArgument(f"{field}: got 0, expected at least 1")


def real(value: object, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InvalidArgument(f"{field}: got {summary(value)}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise InvalidArgument(f"{field}: got a whole number too large for a float, expected a smaller one") from None


def span(value: object, field: str, *, is_zero_allowed: bool = False) -> float:
    """Return a time in seconds, which must be positive; `math.inf` is no limit."""
    seconds = real(value, field)
    if not (seconds > 0 or (is_zero_allowed and seconds == 0)):
        raise InvalidArgument(f"{field}: got {value} s, expected a positive time")
    return seconds


def flag(value: object, field: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise InvalidArgument(f"{field}: got {summary(value)}, expected True or False")
    return bool(value)


def text(value: object, field: str) -> str:
    """Return the value as a string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{field}: got {summary(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{field}: got {value!a}, expected a string that UTF-8 can encode") from None
    return str(value)


def summary(value: object) -> str:
    """Describe a value for an error message: simple values by repr, others by type name."""
    plain = value is None or isinstance(value, str | int | float | tuple | np.number)
    return repr(value) if plain else type(value).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint for an error message if a known name is close to the one given, else an empty string."""
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
