"""The recorder: begins and ends call records, and passes them to counters and traces."""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..domain import Answer
from ..errors import SidelightError
from .call_record import CallRecord
from .counters import Counters, Tally, reason_of_error

if TYPE_CHECKING:
    from .tracing import Tracing

Headers = Callable[[], Iterable[tuple[str, Any]] | None]  # called only if needed, because it copies


class Telemetry:
    """The call records of one server, counted and optionally traced. Used on the event loop only."""

    def __init__(self, tracing: "Tracing | None" = None) -> None:
        self.counters = Counters()
        self._tracing = tracing

    def begin(self, call: str, headers: Headers, *, caller: str = "") -> CallRecord:
        """Return the call record of a batch that has arrived. The headers may name its parent trace."""
        call_record = CallRecord(call, time.monotonic(), caller)
        if self._tracing:
            self._tracing.begin(call_record, headers() or ())
        return call_record

    def answered(self, call_record: CallRecord, answer: Answer, tally: Tally) -> None:
        """Record a final answer with the tally of its examples."""
        call_record.code = 0
        self.counters.answered(call_record, answer.timing, tally)

    def failed(self, call_record: CallRecord, error: SidelightError) -> None:
        call_record.code, call_record.reason = error.code, reason_of_error(error)

    def end(self, call_record: CallRecord) -> None:
        """End a record, after the answer or failure was written or the client disconnected."""
        self.counters.ended(call_record)
        if self._tracing and call_record.span is not None:
            self._tracing.end(call_record)

    def refuse(self, call: str, headers: Headers, error: SidelightError) -> None:
        """Record a batch or a stream that was rejected at once."""
        call_record = self.begin(call, headers)
        self.failed(call_record, error)
        self.end(call_record)
