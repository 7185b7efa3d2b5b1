"""What is counted: requests, examples, reasons of failures, devices and models."""

import asyncio
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from google.protobuf.duration_pb2 import Duration
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, model_pb2_grpc
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.app.server import Server
from sidelight_server.domain import Answer, Explanation, Provenance, Request, Timing
from sidelight_server.errors import Cancelled, Internal, ResourceExhausted, Unavailable
from sidelight_server.telemetry.counters import REASONS, Tally
from sidelight_server.telemetry.recorder import Telemetry
from torch import nn

from support.messages.attribution import ask, attribute, cancel, floats
from support.messages.conversation import Conversation
from support.models import Linear
from support.models.reloadable import SOURCE
from support.servers.counters import count_of
from support.servers.exposition import exposed, in_thread, scrape, scrape_of
from support.servers.running import TIMEOUT_S, Running, gated, running
from support.waiting import until


def test_a_request_is_counted_by_call_model_method_and_code(tmp_path: Path) -> None:
    with running(Linear(), tmp_path, device="cpu") as server:
        server.stub.Attribute(ask(floats(2)), timeout=TIMEOUT_S)
        with Conversation(server.channel) as stream:
            stream.send(attribute("a", floats(1)), attribute("b", floats(3)))
            stream.finish()
        with pytest.raises(grpc.RpcError):
            server.stub.Attribute(ask(floats(1), method=pb.Method()), timeout=TIMEOUT_S)
        counted = scrape_of(server)
    name = "sidelight_requests_total"
    assert counted.sum(name, call="Attribute", model="model", method="gradient", code="OK") == 1
    assert counted.sum(name, call="AttributeStream", model="model", method="gradient", code="OK") == 2
    assert counted.sum(name, call="Attribute", model="", method="", code="INVALID_ARGUMENT") == 1
    assert counted.sum(name) == 4
    assert counted.sum("sidelight_failures_total") == counted.sum("sidelight_failures_total", reason="invalid") == 1
    assert counted.sum("sidelight_answers_total", transport="inline") == 3
    assert counted.sum("sidelight_chunk_rows_sum") == 6


def test_a_call_that_is_refused_unread_is_counted_by_its_code_alone(tmp_path: Path) -> None:
    users, admins = tmp_path / "users", tmp_path / "admins"
    for path in (users, admins):
        path.touch(mode=0o600)
        path.write_text(f"{path.name}-token")
    name = "sidelight_refused_calls_total"
    with running(Linear(), tmp_path, device="cpu", tokens=users, admin_tokens=admins) as server:
        assert {each["code"] for each in scrape_of(server).labels(name)} == {
            "UNAUTHENTICATED", "PERMISSION_DENIED", "UNAVAILABLE"
        }  # fmt: skip
        user = [("authorization", "Bearer users-token")]
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S, metadata=user)
        with Conversation(server.channel) as stream:
            assert stream.end()[1] is grpc.StatusCode.UNAUTHENTICATED
        unknown = server.channel.unary_unary("/never/heard.of.it")
        reload = model_pb2_grpc.ModelServiceStub(server.channel).ReloadModel
        for call in (
            lambda: server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S),
            lambda: unknown(b"", timeout=TIMEOUT_S),
            lambda: reload(model_pb2.ReloadModelRequest(), timeout=TIMEOUT_S, metadata=user),
        ):
            with pytest.raises(grpc.RpcError):
                call()
        counted = scrape_of(server)
    assert counted.sum(name, code="UNAUTHENTICATED") == 3
    assert counted.sum(name, code="PERMISSION_DENIED") == 1
    assert counted.sum(name, code="UNAVAILABLE") == 0
    assert counted.sum("sidelight_requests_total") == 1
    assert counted.sum("sidelight_failures_total") == 0


def test_every_answer_is_in_the_histograms_once(tmp_path: Path) -> None:
    with running(Linear(), tmp_path, device="cpu") as server:
        timings = [server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S).result.timing for _ in range(3)]
        counted = scrape_of(server)
    for span in ("admission", "prepare", "queue", "compute", "total"):
        name = f"sidelight_{span}_seconds"
        assert counted.sum(f"{name}_count", model="model") == counted.sum(f"{name}_bucket", le="+Inf") == 3
        seconds = sum(getattr(each, span).ToNanoseconds() for each in timings) / 1e9
        assert counted.sum(f"{name}_sum") == pytest.approx(seconds, abs=1e-8)  # the answers' are whole nanoseconds
    parts = sum(counted.sum(f"sidelight_{each}_seconds_sum") for each in ("admission", "prepare", "queue", "compute"))
    assert parts <= counted.sum("sidelight_total_seconds_sum")


def test_requests_in_flight_are_reported(tmp_path: Path) -> None:
    with gated(tmp_path, device="cpu") as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("a", floats(3)))
        assert gate.reached.wait(TIMEOUT_S)
        with exposed(server) as address:
            during = scrape(address)
            gate.open()
            stream.finish()
            gauges = [f"sidelight_{each}" for each in ("batches_in_flight", "rows_in_flight", "in_flight_bytes")]
            until_s = time.monotonic() + TIMEOUT_S
            while any(map(scrape(address).sum, ["sidelight_streams_open", *gauges])):  # it ends a moment later
                assert time.monotonic() < until_s
    assert during.sum("sidelight_batches_in_flight") == during.sum("sidelight_streams_open") == 1
    assert during.sum("sidelight_rows_in_flight", device="cpu") == 3
    assert during.sum("sidelight_in_flight_bytes") >= 3 * 3 * 4 * 5 * 4


def test_the_backlog_is_the_rows_in_flight_over_the_rows_per_second(tmp_path: Path) -> None:
    with gated(tmp_path, device="cpu") as (gate, server), Conversation(server.channel) as stream:
        gate.open()
        idle = server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S).result.timing
        gate.shut()
        seconds_per_row = []
        with exposed(server) as address:
            for n, id_ in enumerate("ab", 1):
                stream.send(attribute(id_, floats(3)))
                until_s = time.monotonic() + TIMEOUT_S
                while (now := scrape(address)).sum("sidelight_rows_in_flight") < 3 * n:
                    assert time.monotonic() < until_s
                seconds_per_row.append(now.sum("sidelight_backlog_seconds") / (3 * n))
        gate.open()
        first, last = [each.result.timing.backlog.ToNanoseconds() for each in stream.finish()]
    assert seconds_per_row[0] > 0
    assert seconds_per_row[1] == pytest.approx(seconds_per_row[0])  # no chunk has ended between the two
    assert idle.backlog.ToNanoseconds() == last == 0  # nothing else was there
    assert first > 0


def test_time_spent_waiting_for_a_permit_is_reported_as_admission(tmp_path: Path) -> None:
    with (
        gated(tmp_path, device="cpu", max_stream_in_flight=1) as (gate, server),
        Conversation(server.channel) as stream,
    ):
        stream.send(attribute("first", floats(1)))
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("second", floats(1)), cancel("none"))
        while not server.run(_waits(server)):  # one iteration of the event loop each
            pass
        seen = time.monotonic()
        server.run(asyncio.sleep(0.05))
        opened = time.monotonic()
        gate.open()
        answers = {each.id: each.result.timing for each in stream.finish()}
    second = answers["second"]
    assert second.admission.ToNanoseconds() / 1e9 >= opened - seen  # it waited all that time
    spans = (second.admission, second.prepare, second.queue, second.compute)
    assert sum(each.ToNanoseconds() for each in spans) <= second.total.ToNanoseconds() + 4


async def _waits(server: Running) -> bool:
    return server.counts().unanswered == 2


def test_each_way_to_fail_has_its_reason(tmp_path: Path) -> None:
    brief = Duration(nanos=50_000_000)
    with gated(tmp_path, device="cpu", max_in_flight=2) as (gate, server), Conversation(server.channel) as stream:
        stream.send(attribute("runs", floats(1)), attribute("late", floats(1), timeout=brief))
        assert stream.receive().failure.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert gate.reached.wait(TIMEOUT_S)
        stream.send(attribute("taken", floats(1)))
        while not server.run(_is_full(server)):
            pass
        with pytest.raises(grpc.RpcError):
            server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)  # overloaded
        stream.send(cancel("taken"))
        assert stream.receive().failure.code == grpc.StatusCode.CANCELLED.value[0]
        while server.run(_is_full(server)):  # its permit is released a moment later
            pass
        call = server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S)  # whose caller disconnects
        while not server.run(_is_full(server)):
            pass
        call.cancel()
        while server.run(_is_full(server)):  # else it could be answered before the server handles the cancel
            pass
        gate.open()
        stream.finish()
        counted = scrape_of(server)
    name = "sidelight_failures_total"
    assert counted.sum(name, of="batch", reason="deadline") == 1
    assert counted.sum(name, of="batch", reason="overloaded") == 1
    assert counted.sum(name, of="batch", reason="cancelled") == 2
    assert counted.sum("sidelight_requests_total", code="CANCELLED") == 2
    assert counted.sum("sidelight_requests_total", code="RESOURCE_EXHAUSTED") == 1


async def _is_full(server: Running) -> bool:
    return server.counts().permits == 2


class Faulty(nn.Module):
    """A linear model that fails on examples that begin with 1 (raises), 2 (out of memory) or 3 (no number)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = Linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        marks = set(x[:, 0, 0, 0].tolist())
        if 1.0 in marks:
            raise RuntimeError("broken")
        if 2.0 in marks:
            raise MemoryError
        return self.linear(x) / (0.0 if 3.0 in marks else 1.0)


@pytest.mark.serial  # on a busy machine a call arrives so late that it seems to be cancelled before its deadline
def test_a_passed_deadline_is_not_counted_as_a_disconnected_caller(tmp_path: Path) -> None:
    with gated(tmp_path, device="cpu") as (gate, server):
        grpc.channel_ready_future(server.channel).result(TIMEOUT_S)
        for timeout_s in (1.0, 1.1, 1.2):  # long compared with the delivery of a call on a busy machine
            with pytest.raises(grpc.RpcError) as caught:
                server.stub.Attribute(ask(floats(1)), timeout=timeout_s)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gate.open()
        # The server may see the last deadline a moment after the caller.
        until(server, lambda: scrape_of(server).sum("sidelight_requests_total") == 3)
        counted = scrape_of(server)
    assert counted.sum("sidelight_requests_total", code="DEADLINE_EXCEEDED") == 3
    assert counted.sum("sidelight_failures_total", reason="deadline") == 3


def test_a_model_on_a_stuck_device_does_not_serve(tmp_path: Path) -> None:
    with gated(tmp_path, device="cpu", stuck_s=0.2) as (gate, server), exposed(server) as address:
        assert scrape(address).sum("sidelight_model_serving") == 1
        call = server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S)
        until_s = time.monotonic() + TIMEOUT_S
        while scrape(address).sum("sidelight_model_serving"):
            assert time.monotonic() < until_s
        gate.open()
        assert not call.result().result.failures
        while not scrape(address).sum("sidelight_model_serving"):  # the answer may be sent before the worker is idle
            assert time.monotonic() < until_s


def test_an_example_that_fails_alone_is_counted_by_reason(tmp_path: Path) -> None:
    images = floats(4)
    images[:, 0, 0, 0] = (1, 2, 3, 0)
    with running(Faulty(), tmp_path, device="cpu") as server:
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)  # from here on the model is known to accept this shape
        answer = server.stub.Attribute(ask(images), timeout=TIMEOUT_S)
        counted = scrape_of(server)
    assert {each.example for each in answer.result.failures} >= {0, 1, 2}
    name = "sidelight_failures_total"
    assert counted.sum(name, of="example", reason="oom") == 1
    assert counted.sum(name, of="example", reason="internal") == len(answer.result.failures) - 1
    assert counted.sum(name, of="batch") == 0
    assert counted.sum("sidelight_out_of_memory_total", device="cpu") >= 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ResourceExhausted("full", retry_delay_s=0.1), "overloaded"),
        (ResourceExhausted("too large"), "invalid"),
        (Unavailable("going away"), "dropped"),
        (Cancelled("taken back"), "cancelled"),
        (Internal("failed"), "internal"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_errors_have_reasons(error: sidelight_server.errors.SidelightError, reason: str) -> None:
    telemetry = Telemetry()
    telemetry.refuse("Attribute", tuple, error)
    assert reason in REASONS
    assert count_of(telemetry, "sidelight_failures_total", of="batch", model="", reason=reason) == 1
    assert count_of(telemetry, "sidelight_failures_total") == 1


def test_a_device_and_the_versions_of_models_are_reported(tmp_path: Path) -> None:
    with running(Linear(), tmp_path, device="cpu") as server:
        digest = server.engine.model("").digest
        counted = scrape_of(server)
    assert counted.labels("sidelight_model_info") == [
        {"model": "model", "version": "1", "digest": digest, "precision": "float32"}
    ]
    assert counted.sum("sidelight_model_serving", model="model") == 1
    assert counted.sum("sidelight_device_memory_bytes", device="cpu") > 2**20
    assert counted.sum("sidelight_device_moves", device="cpu") == 1
    assert counted.sum("process_open_fds") > 3


def test_loads_that_fail_are_counted(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"cut")
    settings = Settings(models={"bad": {"model": SOURCE, "weights": weights, "load": "lazy"}}, device="cpu")
    with Engine(list(settings.of_models().values()), settings) as engine:
        with pytest.raises(sidelight_server.errors.SidelightError):
            asyncio.run(engine.registry.ready("bad"))
        assert engine.registry.find("bad").n_failed == 1


def test_two_devices_of_one_name_have_labels_of_their_own(tmp_path: Path) -> None:
    with running(Linear(), tmp_path, device="cpu,cpu") as server:
        counted = scrape_of(server)
    assert [each["device"] for each in counted.labels("sidelight_device_moves")] == ["cpu", "cpu#1"]


# Predictions that differ


@pytest.mark.parametrize("is_streamed", [False, True], ids=["unary", "stream"])
def test_a_prediction_that_is_not_the_served_one_is_flagged_and_counted(
    tmp_path: Path, spec: ModelSpec, floats: torch.Tensor, is_streamed: bool
) -> None:
    engine = Engine([spec], Settings(device="cpu"))
    server = Server(engine, listen=[f"unix:{tmp_path}/s"], metrics_listen="127.0.0.1:0")
    with in_thread(server), sidelight.connect(server.addresses[0]) as client:
        plain = client.attribute(floats)
        assert [each.is_mismatch for each in plain.predictions] == [None] * 5
        found = [each.index for each in plain.predictions]
        served = [found[0], plain.predictions[1].label, found[2] + 1, "no class of this model", 10**6]
        if is_streamed:
            (answer,) = client.stream([sidelight.Batch(floats, served_classes=served)])
        else:
            answer = client.attribute(floats, served_classes=served)
        assert [each.is_mismatch for each in answer.predictions] == [False, False, True, True, True]
        np.testing.assert_array_equal(answer.maps, plain.maps)
        counted = scrape(server.metrics)
        for wrong in ([0], "cat", 3, [0] * 6):
            with pytest.raises(sidelight.InvalidArgument, match="served_classes: got"):
                client.attribute(floats, served_classes=wrong)
    assert counted.sum("sidelight_predictions_compared_total", model="small") == 5
    assert counted.sum("sidelight_prediction_mismatches_total", model="small") == 3


def test_served_classes_follow_their_examples_into_parts(spec: ModelSpec, floats: torch.Tensor) -> None:
    one = floats[:1].numpy().nbytes
    with (
        sidelight_server.serve(spec, device="cpu", max_message_bytes=3 * one) as address,
        sidelight.connect(address) as client,
    ):
        found = [client.attribute(each).predictions[0].index for each in floats]
        served = [found[0], found[1] + 1, found[2], found[3], found[4] + 1]
        (answer,) = client.stream([sidelight.Batch(floats, served_classes=torch.tensor(served))])
    assert [each.is_mismatch for each in answer.predictions] == [False, True, False, False, True]


def test_a_wrong_number_of_served_classes_is_refused(tmp_path: Path) -> None:
    served = pb.ServedPredictions(classes=[pb.ClassChoice(index=0)])
    unset = pb.ServedPredictions(classes=[pb.ClassChoice()] * 2)
    with running(Linear(), tmp_path, device="cpu") as server:
        for wrong, fragment in (
            (served, "served_classes: 1 classes for 2 examples"),
            (unset, "served_classes: a class choice is unset"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                server.stub.Attribute(ask(floats(2), served_classes=wrong), timeout=TIMEOUT_S)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert fragment in caught.value.details()


# The cost of counting


def test_a_request_that_resolved_no_model_has_an_empty_model_label() -> None:
    telemetry = Telemetry()
    call_record = telemetry.begin("Attribute", tuple)
    answer = _answer()
    telemetry.answered(call_record, answer, Tally.of(answer))
    telemetry.end(call_record)
    samples = [sample for family in telemetry.counters.registry.collect() for sample in family.samples]
    assert {each.labels["model"] for each in samples if "model" in each.labels} == {""}
    assert not [each for each in samples if each.name.startswith("sidelight_prediction")]


def _answer() -> Answer:
    provenance = Provenance(*[None] * len(Provenance._fields))
    explanation = Explanation(0, 0.5, (), None, None)
    timing = Timing(0.1, 0.2, 0.3, 0.7, 0.1)
    return Answer(Request(np.empty(0)), np.zeros((1, 2, 2), np.float32), (explanation,), (), provenance, timing)
