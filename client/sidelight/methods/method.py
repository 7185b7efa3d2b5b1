"""`Method`: the base class of all attribution methods."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from sidelight.v1 import attribution_pb2 as pb


@dataclass(frozen=True, slots=True, eq=False)
class Method(ABC):
    """An attribution method with its options: its fields are also the options of the method as text."""

    is_one_row: ClassVar[bool] = False  # it computes one row per example

    @abstractmethod
    def message(self) -> pb.Method:
        """Convert to the wire message, with all defaults filled in.

        Raises `InvalidArgument` for values that the schema cannot represent; the server checks ranges.
        """
