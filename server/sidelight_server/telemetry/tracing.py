"""Tracing: exports call records as OpenTelemetry spans, as children of the caller's. Needs the extra `otel`.

The span of a batch lasts from its arrival until its answer is written; its children are admission, prepare, queue, each
chunk, and write. The children are created at the end, from recorded times.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, Status
from .call_record import MAX_CHUNKS, CallRecord
from .logs import Event

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, TracerProvider

log = logging.getLogger("sidelight")

SERVICE = "sidelight.v1.AttributionService"
END_S = 2.0  # time to export the last spans at shutdown
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# By convention only these are errors of the server; the others are the caller's.
_ERRORS = (
    Status.UNKNOWN, Status.DEADLINE_EXCEEDED, Status.UNIMPLEMENTED, Status.INTERNAL, Status.UNAVAILABLE,
    Status.DATA_LOSS,
)  # fmt: skip


class Tracing:
    """Creates the spans of one server with an OpenTelemetry provider. Used on the event loop only."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._provider = provider
        self._tracer = provider.get_tracer("sidelight")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, call_record: CallRecord, headers: Iterable[tuple[str, Any]]) -> None:
        """Begin a batch's span, as a child of the span in the headers, if any. Only sampled ones are recorded."""
        zero_ns = time.time_ns() - _ns(time.monotonic())  # Unix time of the monotonic clock's zero
        span = self._tracer.start_span(
            f"{SERVICE}/{call_record.call}",
            context=self._propagator.extract(dict(headers)),
            kind=self._trace.SpanKind.SERVER,
            start_time=zero_ns + _ns(call_record.arrived_s),
            attributes={"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": call_record.call},
        )
        if span.is_recording():
            call_record.span, call_record.zero_ns, call_record.chunks = span, zero_ns, []

    def end(self, call_record: CallRecord) -> None:
        """End a batch's span and create its children."""
        span: Span = call_record.span
        code = call_record.status
        span.set_attributes(
            {
                "rpc.grpc.status_code": code,
                "sidelight.model": call_record.model,
                "sidelight.method": call_record.method,
                "sidelight.examples": call_record.examples,
                "sidelight.rows": call_record.rows,
                "sidelight.transport": call_record.transport,
            }
        )
        if code:
            span.set_attribute("sidelight.reason", call_record.reason or "cancelled")
        if code in _ERRORS:
            span.set_status(self._trace.StatusCode.ERROR, Status(code).name)
        ended_s = time.monotonic()
        self._parts(call_record, ended_s)
        span.end(call_record.zero_ns + _ns(ended_s))

    def close(self, within_s: float = END_S) -> None:
        """Export remaining spans within a short time: an unresponsive collector must not delay the shutdown."""
        shutdown = getattr(self._provider, "shutdown", None)
        if shutdown is not None:
            ending = threading.Thread(target=shutdown, name="sidelight-spans", daemon=True)
            ending.start()
            ending.join(min(within_s, END_S))

    def _parts(self, call_record: CallRecord, ended_s: float) -> None:
        within, zero_ns = self._trace.set_span_in_context(call_record.span), call_record.zero_ns

        def add_span(name: str, began_s: float, ended_s: float, attributes: dict[str, int] | None = None) -> None:
            span = self._tracer.start_span(name, within, start_time=zero_ns + _ns(began_s), attributes=attributes)
            span.end(zero_ns + _ns(ended_s))

        times = (call_record.arrived_s, call_record.admitted_s, call_record.prepared_s, call_record.started_s)
        for name, began_s, left_s in zip(("admission", "prepare", "queue"), times, times[1:], strict=False):
            if began_s is None:
                break
            add_span(name, began_s, ended_s if left_s is None else left_s)
        chunks = (call_record.chunks or [])[:MAX_CHUNKS]
        for chunk in chunks:
            add_span("chunk", chunk.began_s, chunk.ended_s, {"sidelight.rows": chunk.rows})
        if call_record.writing_s is not None:
            add_span("write", call_record.writing_s, ended_s)


def from_environment() -> Tracing | None:
    """Return the tracing that the `OTEL_*` variables configure; None if they configure none.

    Raises `ConfigurationError` if they name an unknown exporter or one that is not installed.
    """
    # OpenTelemetry treats an empty variable as unset.
    wanted = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if any(map(os.environ.get, _ENDPOINTS)) else "none")
    if wanted == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if wanted != "otlp":
        raise ConfigurationError(f'OTEL_TRACES_EXPORTER: got "{wanted}", expected "otlp" or "none"')
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create()
        processor = BatchSpanProcessor(_exporter())
    except ValueError as error:  # which usually lacks the variable's name
        raise ConfigurationError(f"OTEL_* variables: {error}") from None
    except ImportError as error:
        raise ConfigurationError(
            f"OTEL_* variables enable tracing, but {error.name} is not installed; pip install 'sidelight[otel]', or "
            "set OTEL_SDK_DISABLED=true"
        ) from None
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # no service name was set
        resource = resource.merge(Resource({SERVICE_NAME: "sidelight"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # `close` does it, with a timeout
    provider.add_span_processor(processor)
    log.info(Event("tracing", exporter=wanted))
    return Tracing(provider)


def _exporter() -> "SpanExporter":
    variables = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next(filter(None, map(os.environ.get, variables)), "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter()
    if protocol == "http/protobuf":
        exporter: SpanExporter = import_module(
            "opentelemetry.exporter.otlp.proto.http.trace_exporter"
        ).OTLPSpanExporter()
        return exporter
    raise ConfigurationError(f'OTEL_EXPORTER_OTLP_PROTOCOL: got "{protocol}", expected "grpc" or "http/protobuf"')


def _ns(at_s: float) -> int:
    return round(at_s * 1e9)
