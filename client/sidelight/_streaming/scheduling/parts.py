"""Entries and parts: a batch that was read, and the messages in which it is sent."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # scheduling needs the standard library alone
    from ..._inputs.images import EncodedBatch
    from ...results.attribution import Attribution


@dataclass(eq=False, slots=True)
class Entry:
    """A batch that was read, and the answers to its parts."""

    index: int
    batch: "EncodedBatch"
    deadline_s: float
    n_open: int = 0  # parts without an answer
    answers: "dict[int, Attribution]" = field(default_factory=dict)  # by the index of the part's first example
    id: str = field(init=False)  # the batch's id; its position if it has none

    def __post_init__(self) -> None:
        self.id = self.batch.id or str(self.index)

    @property
    def label(self) -> str:
        """The batch's name in messages."""
        return f"batch {self.id}"

    def add_answer(self, start: int, answer: "Attribution") -> bool:
        """Store a part's answer. Returns whether all parts are answered."""
        self.answers[start] = answer
        self.n_open -= 1
        return not self.n_open


@dataclass(eq=False, slots=True)
class Part:
    """The examples of a batch that are sent as one message; usually all of them."""

    entry: Entry
    start: int
    batch: "EncodedBatch"
    not_before_s: float = 0.0  # a full server's retry delay
    is_suspect: bool = False
    n_deaths: int = 0  # of servers that held no other part of this stream
    holders: list[Hashable] = field(default_factory=list)  # the workers it is sent to: one, or two with hedging
    sent_s: float = 0.0  # when it was sent last
    # Its id on the wire: the batch's id, and the range of its examples unless it is the whole batch.
    id: str = field(init=False)

    def __post_init__(self) -> None:
        id_ = self.entry.id
        self.id = id_ if self.is_whole else f"{id_}:{self.start}-{self.start + len(self.batch)}"

    @property
    def is_whole(self) -> bool:
        return len(self.batch) == len(self.entry.batch)

    @property
    def position(self) -> tuple[int, int]:
        """Its position in the stream: the batch's index and the first example."""
        return self.entry.index, self.start
