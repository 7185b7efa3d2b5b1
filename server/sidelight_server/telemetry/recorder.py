"""The passages: where batches begin and end, and who is told of it."""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ..domain import Answer
from ..errors import SidelightError
from .call_record import Passage
from .counters import Counts, Tally, reason_of_error

if TYPE_CHECKING:
    from .tracing import Tracing

Headers = Callable[[], Iterable[tuple[str, Any]] | None]  # called where they are wanted: they cost a copy


class Passages:
    """The passages of one server, all counted, and traced if that is wanted. The event loop's."""

    def __init__(self, tracing: "Tracing | None" = None) -> None:
        self.counts = Counts()
        self._tracing = tracing

    def begin(self, call: str, headers: Headers, *, caller: str = "") -> Passage:
        """Return the passage of a batch that has come. The call's headers say of which trace it is a part."""
        passage = Passage(call, time.monotonic(), caller)
        if self._tracing:
            self._tracing.begin(passage, headers() or ())
        return passage

    def answered(self, passage: Passage, answer: Answer, tally: Tally) -> None:
        """Take note of an answer that is final, and of what became of its examples."""
        passage.code = 0
        self.counts.answered(passage, answer.timing, tally)

    def failed(self, passage: Passage, error: SidelightError) -> None:
        """Take note of why there is no answer."""
        passage.code, passage.reason = error.code, reason_of_error(error)

    def end(self, passage: Passage) -> None:
        """Tell of a batch whose answer or failure is written, or which nobody waits for any more."""
        self.counts.ended(passage)
        if self._tracing and passage.span is not None:
            self._tracing.end(passage)

    def refuse(self, call: str, headers: Headers, error: SidelightError) -> None:
        """Tell of a batch, or a whole stream, that was refused as soon as it came."""
        passage = self.begin(call, headers)
        self.failed(passage, error)
        self.end(passage)
