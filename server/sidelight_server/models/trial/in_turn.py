"""`InTurn`: runs the passes of loads and measurements between the chunks of requests, or directly."""

from collections.abc import Callable
from typing import Protocol, TypeVar

_Value = TypeVar("_Value")


class InTurn(Protocol):
    """Runs a function between the chunks of a device, and returns its result."""

    def __call__(self, task: Callable[[], _Value]) -> _Value:
        """Run the task and return its result."""


def at_once(task: Callable[[], _Value]) -> _Value:
    """Run a function directly, for a device that serves no requests yet."""
    return task()
