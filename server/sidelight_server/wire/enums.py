"""Enums: validates enum numbers and converts them to domain values. Proto3 accepts any number."""

import enum
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from ..errors import InvalidArgument, Unimplemented

Value = TypeVar("Value")
Member = TypeVar("Member", bound=enum.Enum)
Number = TypeVar("Number", bound=int)


class Enum(Protocol[Number]):
    """The interface of a generated enum."""

    def Name(self, number: Number) -> str:  # noqa: N802
        """Return a number's name."""

    def values(self) -> list[Number]:
        """Return all numbers."""


@functools.cache
def numbers(wire: Any, values: type[Member]) -> dict[Any, Member]:
    """Return the members of a Python enum by the numbers of a generated one, which has the same names with a prefix."""
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", wire.DESCRIPTOR.name).upper() + "_"
    names = ((name.removeprefix(prefix), number) for name, number in wire.items())
    return {number: values[name] for name, number in names if name in values.__members__}


def meaning(number: Number, served: Mapping[Number, Value], field: str, enum: Enum[Number], *, unset: Value) -> Value:
    """Return the value of a number, `unset` for 0. Raises `InvalidArgument` or, if not served, `Unimplemented`."""
    if number == 0:
        return unset
    if number in served:
        return served[number]
    error = Unimplemented if number in enum.values() else InvalidArgument
    raise error(f"{field}: {named(number, enum, served)}")


def named(number: Number, enum: Enum[Number], served: Iterable[Number]) -> str:
    """Return the part of an error message that names the number and the expected names."""
    got = (
        f"{enum.Name(number)} is not served by this version" if number in enum.values() else f"unknown number {number}"
    )
    return f"{got}; expected one of {', '.join(enum.Name(each) for each in served)}"


def number_of(table: Mapping[Number, Value], value: Value) -> Number:
    """Return the enum number of a value."""
    return next(number for number, each in table.items() if each is value)
