"""Enums: numbers and their meanings. Proto3 lets any number through, so they are checked here."""

from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from ..errors import InvalidArgument, Unimplemented

Value = TypeVar("Value")
Number = TypeVar("Number", bound=int)


class Enum(Protocol[Number]):
    """A generated enum."""

    def Name(self, number: Number) -> str:  # noqa: N802
        """Return a number's name."""

    def values(self) -> list[Number]:
        """Return all numbers."""


def meaning(number: Number, served: Mapping[Number, Value], field: str, enum: Enum[Number], *, unset: Value) -> Value:
    """Return what a number stands for: `InvalidArgument` for an unknown one, `Unimplemented` for one not served."""
    if number == 0:
        return unset
    if number in served:
        return served[number]
    error = Unimplemented if number in enum.values() else InvalidArgument
    raise error(f"{field}: {named(number, enum, served)}")


def named(number: Number, enum: Enum[Number], served: Iterable[Number]) -> str:
    """Return words that say what a number is, and which ones are expected."""
    got = (
        f"{enum.Name(number)} is not served by this version" if number in enum.values() else f"unknown number {number}"
    )
    return f"{got}; expected one of {', '.join(enum.Name(each) for each in served)}"


def number_of(table: Mapping[Number, Value], value: Value) -> Number:
    """Return the number that stands for a value."""
    return next(number for number, each in table.items() if each is value)
