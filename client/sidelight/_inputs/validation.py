"""Validation: a caller's values become values that the schema can hold. The server checks ranges."""

import numpy as np

from ..exceptions import InvalidArgument


def whole(value: object, field: str, *, bits: int = 32) -> int:
    """Return a whole number of so many bits, with a sign."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise InvalidArgument(f"{field}: got {summary(value)}, expected a whole number")
    if not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
        raise InvalidArgument(f"{field}: got {value}, expected a {bits}-bit number")
    return int(value)


def counted(value: object, field: str) -> int:
    """Return a whole number other than 0, which on the wire would mean that it is unset."""
    if number := whole(value, field):
        return number
    raise InvalidArgument(f"{field}: got 0, expected at least 1")


def real(value: object, field: str) -> float:
    """Return a number in double precision."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InvalidArgument(f"{field}: got {summary(value)}, expected a number")
    try:
        return float(value)
    except OverflowError:
        raise InvalidArgument(f"{field}: got a whole number beyond every double, expected a smaller one") from None


def span(value: object, field: str, *, is_zero_allowed: bool = False) -> float:
    """Return a time in seconds, which must be positive; `math.inf` is for ever."""
    seconds = real(value, field)
    if not (seconds > 0 or (is_zero_allowed and seconds == 0)):
        raise InvalidArgument(f"{field}: got {value} s, expected a positive time")
    return seconds


def flag(value: object, field: str) -> bool:
    """Return a truth value."""
    if not isinstance(value, bool | np.bool_):
        raise InvalidArgument(f"{field}: got {summary(value)}, expected True or False")
    return bool(value)


def text(value: object, field: str) -> str:
    """Return a text, which must be one that UTF-8 can hold."""
    if not isinstance(value, str):
        raise InvalidArgument(f"{field}: got {summary(value)}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{field}: got {value!a}, expected a text in Unicode") from None
    return str(value)


def summary(value: object) -> str:
    """Return a value as an error tells it: a short one itself, any other by its type."""
    plain = value is None or isinstance(value, str | int | float | tuple | np.number)
    return repr(value) if plain else type(value).__name__
