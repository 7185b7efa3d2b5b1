"""Counters of requests, as plain numbers. `app.prometheus` exports them; counting never waits for a scrape.

Each count has one thread that adds to it. Others may read it meanwhile: a number may be a moment old, none is torn.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Self

from ..domain import Answer, Timing
from ..errors import PermissionDenied, ResourceExhausted, SidelightError, Unauthenticated, Unavailable
from .call_record import CallRecord
from .histogram import Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SPANS = ("admission", "prepare", "queue", "compute", "total")
REASONS = ("overloaded", "dropped", "cancelled", "deadline", "invalid", "oom", "internal")
UNREAD = (Unauthenticated.code, PermissionDenied.code, Unavailable.code)  # what a call may be refused with

OUT_OF_MEMORY = ResourceExhausted.code
_REASONS = {1: "cancelled", 2: "internal", 4: "deadline", 10: "cancelled", 13: "internal", 14: "dropped"}


@dataclass(frozen=True, slots=True)
class Tally:
    """What became of an answer's examples, counted apart from `Counters`: of many examples in a worker thread."""

    failures: Counter[str]  # by reason
    refined: Counter[str]  # "met" or "missed": examples with a tolerance
    n_compared: int  # predictions that the caller told the served class of
    n_mismatches: int  # those that were another class

    @classmethod
    def of(cls, answer: Answer) -> Self:
        """Count the examples of an answer."""
        convergences = [each.convergence for each in answer.explanations if each is not None]
        known = [each for each in answer.mismatches if each is not None] if answer.request.served else []
        return cls(
            # The one thing that an example alone can be short of is memory.
            Counter("oom" if each.code == OUT_OF_MEMORY else reason_of(each.code) for each in answer.failures),
            Counter(
                "met" if each.is_met else "missed"
                for each in convergences
                if each is not None and each.is_met is not None
            ),
            len(known),
            sum(known),
        )


class Counters:
    """What became of the batches, and of the calls, of one server. The event loop's."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, str, int]] = Counter()  # call, model, method, status code
        self.unread: Counter[int] = Counter()  # calls that were refused before anything was read, by status code
        self.failures: Counter[tuple[str, str, str]] = Counter()  # what failed (batch, example), model, reason
        self.transports: Counter[str] = Counter()
        self.compared: Counter[str] = Counter()  # by model: predictions that the caller told the served class of
        self.mismatches: Counter[str] = Counter()  # by model: those that were another class
        self.refined: Counter[tuple[str, str]] = Counter()  # by model and "met" or "missed": examples with a tolerance
        self.spans: defaultdict[str, dict[str, Histogram]] = defaultdict(_histograms)  # by model, then by name

    def answered(self, call_record: CallRecord, timing: Timing, tally: Tally) -> None:
        """Count an answer that is final."""
        model = call_record.model
        self.transports[call_record.transport] += 1
        spans = self.spans[model]
        spans["admission"].add(timing.admission_s)
        spans["prepare"].add(timing.prepare_s)
        spans["queue"].add(timing.queue_s)
        spans["compute"].add(timing.compute_s)
        spans["total"].add(timing.total_s)
        for reason, n in tally.failures.items():
            self.failures["example", model, reason] += n
        for said, n in tally.refined.items():
            self.refined[model, said] += n
        if tally.n_compared or tally.n_mismatches:
            self.compared[model] += tally.n_compared
            self.mismatches[model] += tally.n_mismatches

    def ended(self, call_record: CallRecord) -> None:
        """Count a batch whose answer, or failure, is written."""
        code = call_record.status
        self.requests[call_record.call, call_record.model, call_record.method, code] += 1
        if code:
            self.failures["batch", call_record.model, call_record.reason or reason_of(code)] += 1


def reason_of(code: int) -> str:
    """Return the reason that a status code stands for, one of `REASONS`."""
    return _REASONS.get(code, "invalid")


def reason_of_error(error: SidelightError) -> str:
    """Return the reason for which a whole batch failed, one of `REASONS`."""
    if isinstance(error, ResourceExhausted) and error.retry_delay_s is not None:
        return "overloaded"  # without a delay it is too large, whenever it is sent
    return reason_of(error.code)


def _histograms() -> dict[str, Histogram]:
    return {name: Histogram(SECONDS) for name in SPANS}
