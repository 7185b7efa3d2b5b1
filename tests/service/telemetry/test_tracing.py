"""Tracing: a batch's spans are children of its caller's, in order, and cost nothing unless enabled."""

import itertools
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, StatusCode
from sidelight.v1 import attribution_pb2 as pb
from sidelight_server import ConfigurationError
from sidelight_server.telemetry.recorder import Telemetry
from sidelight_server.telemetry.tracing import Tracing, from_environment

from support.messages.attribution import ask, attribute, floats
from support.models import Linear
from support.servers.running import TIMEOUT_S, Running, gated, running

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-01"),)
NOT_SAMPLED = (("traceparent", f"00-{TRACE}-{SPAN}-00"),)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def trace(server: Running, exporter: InMemorySpanExporter) -> None:
    """Export the spans of a running server."""
    provider = TracerProvider(sampler=ParentBased(ALWAYS_ON), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server.server.handler.telemetry._tracing = Tracing(provider)


def spans(server: Running, exporter: InMemorySpanExporter) -> list[tuple[ReadableSpan, list[ReadableSpan]]]:
    """Return the batches' spans in the order of their ends, each with its child spans in the order of their starts."""
    server.until_all_permits_are_back()
    finished = exporter.get_finished_spans()
    batches = [each for each in finished if each.kind is SpanKind.SERVER]
    below = {each.context.span_id: [] for each in batches}
    for each in finished:
        if each.kind is not SpanKind.SERVER:
            below[each.parent.span_id].append(each)
    return [(each, sorted(below[each.context.span_id], key=lambda part: part.start_time)) for each in batches]


def names(parts: list[ReadableSpan]) -> list[str]:
    return [each.name for each in parts]


def check_order(batch: ReadableSpan, parts: list[ReadableSpan]) -> None:
    """Each part lies within the batch, and begins where the one before ended, or after."""
    for before, after in itertools.pairwise(parts):
        assert before.end_time <= after.start_time
    assert batch.start_time == parts[0].start_time
    assert parts[-1].end_time == batch.end_time


def test_a_unary_call_has_its_spans_below_the_callers(tmp_path: Path, exporter: InMemorySpanExporter) -> None:
    with running(Linear(), tmp_path, device="cpu", max_chunk_rows=2) as server:
        trace(server, exporter)
        server.stub.Attribute(ask(floats(5)), timeout=TIMEOUT_S, metadata=SAMPLED)
        ((batch, parts),) = spans(server, exporter)
    assert batch.name == "sidelight.v1.AttributionService/Attribute"
    assert f"{batch.context.trace_id:032x}" == TRACE
    assert f"{batch.parent.span_id:016x}" == SPAN
    assert names(parts) == ["admission", "prepare", "queue", "chunk", "chunk", "chunk", "write"]
    assert [each.attributes["sidelight.rows"] for each in parts if each.name == "chunk"] == [2, 2, 1]
    assert {each.context.trace_id for each in parts} == {batch.context.trace_id}
    check_order(batch, parts)
    assert dict(batch.attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "sidelight.v1.AttributionService",
        "rpc.method": "Attribute",
        "rpc.grpc.status_code": 0,
        "sidelight.model": "model",
        "sidelight.method": "gradient",
        "sidelight.examples": 5,
        "sidelight.rows": 5,
        "sidelight.transport": "inline",
    }


def test_each_batch_of_a_stream_has_its_own_below_the_callers(tmp_path: Path, exporter: InMemorySpanExporter) -> None:
    with running(Linear(), tmp_path, device="cpu") as server:
        trace(server, exporter)
        requests = [attribute("a", floats(2)), attribute("b", floats(1), method=pb.Method()), attribute("c", floats(3))]
        list(server.stub.AttributeStream(iter(requests), timeout=TIMEOUT_S, metadata=SAMPLED))
        batches = spans(server, exporter)
    assert {f"{batch.parent.span_id:016x}" for batch, _ in batches} == {SPAN}
    by_rows = {batch.attributes["sidelight.rows"]: (batch, parts) for batch, parts in batches}
    assert sorted(by_rows) == [0, 2, 3]
    for n in (2, 3):
        assert names(by_rows[n][1]) == ["admission", "prepare", "queue", "chunk", "write"]
        check_order(*by_rows[n])
    refused, parts = by_rows[0]
    assert refused.attributes["rpc.grpc.status_code"] == 3
    assert refused.attributes["sidelight.reason"] == "invalid"
    assert refused.status.status_code is StatusCode.UNSET  # an error of the caller
    assert names(parts) == ["admission"]


def test_a_batch_that_is_late_ends_in_the_queue(tmp_path: Path, exporter: InMemorySpanExporter) -> None:
    with gated(tmp_path, device="cpu") as (gate, server):
        trace(server, exporter)
        first = server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        with pytest.raises(grpc.RpcError):
            server.stub.Attribute(ask(floats(1), timeout=Duration(nanos=50_000_000)), timeout=TIMEOUT_S)
        gate.open()
        first.result()
        (late, parts), (_, whole) = spans(server, exporter)
    assert names(parts) == ["admission", "prepare", "queue"]
    assert late.status.status_code is StatusCode.ERROR
    assert late.attributes["sidelight.reason"] == "deadline"
    assert late.parent is None
    assert names(whole) == ["admission", "prepare", "queue", "chunk", "write"]


def test_a_trace_that_the_caller_does_not_sample_is_not_exported(
    tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    with running(Linear(), tmp_path, device="cpu") as server:
        trace(server, exporter)
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S, metadata=NOT_SAMPLED)
        assert spans(server, exporter) == []


@pytest.mark.parametrize("parent", ["", "00-0-0-01", "x" * 5000, f"ff-{TRACE}-{SPAN}-01"])
def test_an_invalid_parent_begins_a_new_trace(tmp_path: Path, exporter: InMemorySpanExporter, parent: str) -> None:
    with running(Linear(), tmp_path, device="cpu") as server:
        trace(server, exporter)
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S, metadata=(("traceparent", parent),))
        ((batch, _),) = spans(server, exporter)
    assert batch.parent is None


# Settings of the operator


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)


def test_without_an_exporter_nothing_is_traced_and_nothing_imported() -> None:
    code = (
        "import sys, sidelight_server.telemetry.tracing as tracing; assert tracing.from_environment() is None; "
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=TIMEOUT_S)
    call_record = Telemetry().begin("Attribute", tuple)
    assert call_record.span is call_record.chunks is None


@pytest.mark.parametrize(
    ("variables", "pattern"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, 'OTEL_TRACES_EXPORTER: got "zipkin", expected "otlp" or "none"'),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier"}, 'got "carrier", expected "grpc"'),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, "is not installed"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_TIMEOUT": "soon"}, r"^OTEL_\* variables: .*'soon'"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_BSP_MAX_QUEUE_SIZE": "-3"}, r"^OTEL_\* variables: .*max_queue_size"),
    ],
    ids=["exporter", "protocol", "not installed", "no time", "no size"],
)
def test_an_unavailable_exporter_is_reported_at_start(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], pattern: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigurationError, match=pattern):
        from_environment()


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "")
    assert from_environment() is None


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[trace_service_pb2.ExportTraceServiceRequest] = []

    def Export(  # noqa: N802
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


def test_spans_reach_a_collector_before_the_server_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector, server = Collector(), grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    tracing = from_environment()
    assert tracing is not None
    with running(Linear(), tmp_path, device="cpu") as traced:
        traced.server.handler.telemetry._tracing = traced.server._tracing = tracing
        traced.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
        traced.until_all_permits_are_back()
    server.stop(None).wait()
    (resource,) = [each for request in collector.requests for each in request.resource_spans]
    attributes = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert attributes["service.name"] == "sidelight"
    exported = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(exported) == sorted(
        ["admission", "prepare", "queue", "chunk", "write", "sidelight.v1.AttributionService/Attribute"]
    )
