"""The call record: timestamps and outcome of one request, recorded stage by stage.

Counters and spans are derived from it at its end. Times are on the monotonic clock, in seconds; None: stage not
reached.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..errors import Status

MAX_CHUNKS = 128  # chunks of one batch that are recorded


class ChunkTimes(NamedTuple):
    """When a chunk with rows of the batch was launched and read."""

    began_s: float
    ended_s: float
    rows: int  # all rows in the chunk, also of other batches


@dataclass(slots=True, eq=False)
class CallRecord:
    """One request: timestamps, outcome, identity. Owned by the event loop, except `chunks`: see `ActiveRequest`."""

    call: str
    arrived_s: float
    caller: str = ""  # for fair sharing: see `Callers`
    id: str = ""  # the client's request id, at most 128 bytes
    model: str = ""  # empty until the model is found
    method: str = ""
    transport: str = "inline"
    examples: int = 0
    rows: int = 0  # sent to the device
    admitted_s: float | None = None
    prepared_s: float | None = None
    started_s: float | None = None  # the first row was taken
    writing_s: float | None = None
    code: int | None = None  # status code; None: no answer, because the client disconnected
    reason: str = ""  # of a failure, if the code does not determine it
    span: Any = field(default=None, repr=False)  # if traced
    zero_ns: int = 0  # Unix time of the monotonic clock's zero, if traced
    chunks: list[ChunkTimes] | None = None  # None: not recorded

    def cut_off(self) -> None:
        """Record that the client did not accept the answer in time."""
        self.code = Status.ABORTED

    @property
    def status(self) -> int:
        return Status.CANCELLED if self.code is None else self.code
