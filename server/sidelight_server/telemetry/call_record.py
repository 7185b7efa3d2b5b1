"""The call record: timestamps and outcome of one request, recorded stage by stage.

Counts and spans are made of it once it has ended. Times are on the monotonic clock, in seconds; None: never got there.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import Status

MAX_CHUNKS = 128  # of one batch that are told one by one


class ChunkTimes(NamedTuple):
    """When a chunk with rows of the batch was launched, and read."""

    began_s: float
    ended_s: float
    rows: int  # in the chunk, of whatever batch


@dataclass(slots=True, eq=False)
class CallRecord:
    """One request: timestamps, outcome, identity. Owned by the event loop, except `chunks`: see `ActiveRequest`."""

    call: str
    arrived_s: float
    caller: str = ""  # with whom its share is counted: see `Callers`
    id: str = ""  # the caller's name for it, at most 128 bytes
    model: str = ""  # the server's own name of it; empty until it is found
    method: str = ""
    transport: str = "inline"
    examples: int = 0
    rows: int = 0  # that were taken to the device
    admitted_s: float | None = None
    prepared_s: float | None = None
    started_s: float | None = None  # the first row was taken
    writing_s: float | None = None
    code: int | None = None  # of the status; None: there is no answer, for nobody waits for one
    reason: str = ""  # of a failure, where the code does not say it
    span: Any = field(default=None, repr=False)  # where it is traced
    zero_ns: int = 0  # of the monotonic clock, since 1970, where it is traced
    chunks: list[ChunkTimes] | None = None  # None: nobody wants to know

    def cut_off(self) -> None:
        """Take note that the answer was not accepted."""
        self.code = Status.ABORTED

    @property
    def status(self) -> int:
        """The status code that it ended with."""
        return Status.CANCELLED if self.code is None else self.code
