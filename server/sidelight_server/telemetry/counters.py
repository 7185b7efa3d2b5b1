"""Counters and histograms of requests, as objects of prometheus_client. `app.metrics.prometheus` exports them."""

import functools
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, Histogram

from ..domain import Answer, Timing
from ..errors import ResourceExhausted, SidelightError, Status
from .call_record import CallRecord

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SPANS = {
    "admission": "from a batch's arrival until it was admitted: the wait for its model, a stream slot and permits",
    "prepare": "decoding and resizing",
    "queue": "waiting for the device, until the first row ran",
    "compute": "from the first row's start to the last row's end",
    "total": "from a batch's arrival until its maps were computed",
}
REASONS = ("overloaded", "dropped", "cancelled", "deadline", "invalid", "oom", "internal")
# Status codes of calls that are rejected before their message is read.
UNREAD = (Status.UNAUTHENTICATED, Status.PERMISSION_DENIED, Status.UNAVAILABLE)

_REASONS = {
    Status.CANCELLED: "cancelled",
    Status.UNKNOWN: "internal",
    Status.DEADLINE_EXCEEDED: "deadline",
    Status.ABORTED: "cancelled",
    Status.INTERNAL: "internal",
    Status.UNAVAILABLE: "dropped",
}


@dataclass(slots=True)
class Tally:
    """Counts over one answer's examples, computed in a worker thread if there are many."""

    failures: Counter[str]  # by reason
    refined: Counter[str]  # "met" or "missed": examples with a tolerance
    n_compared: int  # predictions with a served class
    n_mismatches: int  # predictions that differ from it

    @classmethod
    def of(cls, answer: Answer) -> Self:
        known = [each for each in answer.mismatches if each is not None] if answer.request.served else []
        return cls(
            # For a single example RESOURCE_EXHAUSTED means a lack of memory.
            Counter(
                "oom" if each.code == Status.RESOURCE_EXHAUSTED else reason_of(each.code) for each in answer.failures
            ),
            Counter(
                "met" if each.convergence.is_met else "missed"
                for each in answer.explanations
                if each is not None and each.convergence is not None and each.convergence.is_met is not None
            ),
            len(known),
            sum(known),
        )


@dataclass(frozen=True, slots=True)
class Statistics:
    """The counters of one model, summed over calls and methods. Times are in seconds."""

    n_examples: int
    n_failed: int  # batches
    last_answer_s: float  # Unix time; 0: none yet
    seconds: dict[str, tuple[int, float]]  # of the stages in `SPANS`: number of answers, and their total


@dataclass(frozen=True, slots=True)
class CancellationTimes:
    """Statistics of the times from a cancel until no row of the request runs on the device, in seconds."""

    count: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """The mean; 0 if the count is 0."""
        return self.total_s / self.count if self.count else 0.0

    def __add__(self, other: "CancellationTimes") -> "CancellationTimes":
        longest_s = max(self.longest_s, other.longest_s)
        return CancellationTimes(self.count + other.count, self.total_s + other.total_s, longest_s)


class Counters:
    """The counters of one server's calls and batches, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = functools.partial(prometheus_client.Counter, registry=self.registry)
        self._requests = counter(
            "sidelight_requests",
            "answered batches by call, model, method and status code",
            ("call", "model", "method", "code"),
        )
        self._refused = counter(
            "sidelight_refused_calls", "calls that were rejected before their message was read", ("code",)
        )
        self._failures = counter(
            "sidelight_failures", "failed batches and examples by reason", ("of", "model", "reason")
        )
        self._examples = counter("sidelight_examples", "examples of answered batches", ("model",))
        self._last = Gauge(
            "sidelight_last_answer_timestamp_seconds",
            "Unix time of the last answer",
            ("model",),
            registry=self.registry,
        )
        self._answers = counter("sidelight_answers", "answers by transport of images and maps", ("transport",))
        self._tolerances = counter(
            "sidelight_tolerances", "examples with a tolerance, by whether it was met", ("model", "outcome")
        )
        self._compared = counter(
            "sidelight_predictions_compared", "predictions with a served class to compare", ("model",)
        )
        self._mismatches = counter(
            "sidelight_prediction_mismatches", "predictions that differ from the served class", ("model",)
        )
        self._spans = [
            Histogram(f"sidelight_{name}_seconds", description, ("model",), buckets=SECONDS, registry=self.registry)
            for name, description in SPANS.items()
        ]
        # Cached, because a look-up by labels takes longer than counting.
        self._of_request = functools.cache(lambda *labels: self._requests.labels(*labels))
        self._of_model = functools.cache(lambda model: [each.labels(model) for each in self._spans])
        self._examples_of = functools.cache(lambda model: (self._examples.labels(model), self._last.labels(model)))
        self._by_transport = functools.cache(self._answers.labels)

    def start_at_zero(self, models: Sequence[str]) -> None:
        """Create all series at 0: Prometheus sees no increase in a series that begins with its first failure."""
        for code in UNREAD:
            self._refused.labels(code.name)
        for labels in itertools.product(("batch", "example"), ("", *models), REASONS):
            self._failures.labels(*labels)
        for model in models:
            self._compared.labels(model)
            self._mismatches.labels(model)
            for outcome in ("met", "missed"):
                self._tolerances.labels(model, outcome)

    def statistics(self, model: str) -> Statistics:
        value = functools.partial(self._value, {"model": model})
        failed = (
            sample.value
            for family in self._requests.collect()
            for sample in family.samples
            if sample.name.endswith("_total")
            and sample.labels["model"] == model
            and sample.labels["code"] != Status.OK.name
        )
        return Statistics(
            n_examples=int(value("sidelight_examples_total")),
            n_failed=int(sum(failed)),
            last_answer_s=value("sidelight_last_answer_timestamp_seconds"),
            seconds={
                name: (int(value(f"sidelight_{name}_seconds_count")), value(f"sidelight_{name}_seconds_sum"))
                for name in SPANS
            },
        )

    def _value(self, labels: dict[str, str], name: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def refused(self, code: int) -> None:
        """Count a call that was rejected before its message was read."""
        self._refused.labels(Status(code).name).inc()

    def answered(self, call_record: CallRecord, timing: Timing, tally: Tally) -> None:
        """Count a final answer."""
        model = call_record.model
        self._by_transport(call_record.transport).inc()
        seconds = (timing.admission_s, timing.prepare_s, timing.queue_s, timing.compute_s, timing.total_s)
        for span, value in zip(self._of_model(model), seconds, strict=True):
            span.observe(value)
        examples, last = self._examples_of(model)
        examples.inc(call_record.examples)
        last.set_to_current_time()
        for reason, n in tally.failures.items():
            self._failures.labels("example", model, reason).inc(n)
        for outcome, n in tally.refined.items():
            self._tolerances.labels(model, outcome).inc(n)
        if tally.n_compared:
            self._compared.labels(model).inc(tally.n_compared)
            self._mismatches.labels(model).inc(tally.n_mismatches)

    def ended(self, call_record: CallRecord) -> None:
        """Count a batch after its answer or failure was written."""
        code, model = call_record.status, call_record.model
        self._of_request(call_record.call, model, call_record.method, Status(code).name).inc()
        if code:
            self._failures.labels("batch", model, call_record.reason or reason_of(code)).inc()


def reason_of(code: int) -> str:
    """Return the reason for a status code, one of `REASONS`."""
    return _REASONS.get(Status(code), "invalid")


def reason_of_error(error: SidelightError) -> str:
    """Return the reason for the failure of a whole batch, one of `REASONS`."""
    if isinstance(error, ResourceExhausted) and error.retry_delay_s is not None:
        return "overloaded"  # without a retry delay it is too large and would always fail
    return reason_of(error.code)
