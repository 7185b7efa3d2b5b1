"""The service: the calls of `sidelight.v1`, reflection and health, permits, and callers that disconnect."""

import concurrent.futures
import logging
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc
from sidelight_server import ModelSpec, Settings, serve
from sidelight_server.app.health.health import SERVICES
from sidelight_server.engine.request_cost import BYTES_OF_EXAMPLE
from sidelight_server.wire.requests import MAX_EXAMPLES
from torch import Tensor, nn

from support.messages.attribution import BRIEF, ask, floats, linear_maps, maps_of
from support.models import LABELS, N_CLASSES, Linear
from support.servers.running import TIMEOUT_S, gated, running
from support.tolerances import CLOSED_FORM

Status = grpc.StatusCode


@pytest.fixture
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


def test_a_unary_call_is_answered(channel: grpc.Channel) -> None:
    stub = attribution_pb2_grpc.AttributionServiceStub(channel)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 40, 3), np.uint8)
    response = stub.Attribute(ask(pixels, id="one", model="small"), timeout=TIMEOUT_S)
    result = response.result
    assert response.id == "one"
    assert maps_of(response).shape == (3, 32, 32)
    assert (maps_of(response) >= 0).all()
    assert maps_of(response).any(axis=(1, 2)).all()
    assert result.final
    assert result.transport == pb.TRANSPORT_INLINE
    assert not result.failures
    for example in result.examples:
        prediction, (explained,) = example.prediction, example.targets
        assert prediction.label == LABELS[prediction.index]
        assert explained.index == prediction.index
        assert explained.score == pytest.approx(prediction.probability)
        assert not explained.HasField("against")
        crop = example.geometry.crop
        assert (example.geometry.original_height, example.geometry.original_width) == (48, 40)
        assert (crop.height, crop.width) == (32, 32)
    assert not result.HasField("probabilities")


def test_the_provenance_has_every_default_filled_in(channel: grpc.Channel, device: str) -> None:
    stub = attribution_pb2_grpc.AttributionServiceStub(channel)
    request = ask(floats(1, shape=(3, 32, 32)), target=pb.Target(label="dog"))
    provenance = stub.Attribute(request, timeout=TIMEOUT_S).result.provenance
    model = model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest()).model
    assert (provenance.model, provenance.model_version) == ("small", 1)
    assert provenance.model_digest == model.digest
    assert provenance.method.gradient.magnitude == pb.MAGNITUDE_ABSOLUTE
    assert provenance.target == request.target
    assert provenance.score == model_pb2.SCORE_PROBABILITY
    assert provenance.channels == pb.CHANNEL_REDUCTION_MAX_ABS
    assert provenance.precision == "float32"
    assert provenance.device.startswith(device.partition(":")[0])
    assert provenance.threads > 0
    assert provenance.chunk_rows == model.chunk_rows > 0
    assert {each.name: each.version for each in provenance.software}["torch"] == torch.__version__


def test_the_times_of_an_answer_add_up(channel: grpc.Channel) -> None:
    stub = attribution_pb2_grpc.AttributionServiceStub(channel)
    timing = stub.Attribute(ask(floats(4, shape=(3, 32, 32))), timeout=TIMEOUT_S).result.timing
    parts = [each.ToNanoseconds() for each in (timing.prepare, timing.queue, timing.compute)]
    assert all(part >= 0 for part in parts)
    assert parts[2] > 0
    assert sum(parts) <= timing.total.ToNanoseconds() + 10  # each is rounded to a nanosecond


def test_the_server_reports_its_version_limits_methods_and_models(channel: grpc.Channel) -> None:
    stub = attribution_pb2_grpc.AttributionServiceStub(channel)
    info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=TIMEOUT_S)
    default = Settings()
    assert info.version == metadata.version("sidelight")
    others = {"max_batch_examples": MAX_EXAMPLES, "max_stream_age": Duration(seconds=3600)}
    for name in pb.Limits.DESCRIPTOR.fields_by_name:
        assert getattr(info.limits, name) == (others[name] if name in others else getattr(default, name))
    assert not info.HasField("shared_memory")
    assert list(info.methods) == [field.name for field in pb.Method.DESCRIPTOR.oneofs[0].fields]
    models = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest(), timeout=TIMEOUT_S)
    assert info.models == models.models


def test_models_are_listed_without_labels_and_layers(channel: grpc.Channel) -> None:
    stub = model_pb2_grpc.ModelServiceStub(channel)
    (listed,) = stub.ListModels(model_pb2.ListModelsRequest(), timeout=TIMEOUT_S).models
    assert (listed.name, listed.class_count) == ("small", N_CLASSES)
    assert not listed.labels
    assert not listed.layers


@pytest.mark.parametrize("name", ["", "small"], ids=["by default", "by name"])
def test_a_model_is_reported_whole(name: str, channel: grpc.Channel, module: nn.Module) -> None:
    stub = model_pb2_grpc.ModelServiceStub(channel)
    model = stub.GetModel(model_pb2.GetModelRequest(name=name), timeout=TIMEOUT_S).model
    assert model.name == "small"
    assert model.state == model_pb2.MODEL_STATE_SERVING
    assert tuple(model.labels) == LABELS
    assert list(model.layers) == [str(i) for i in range(7)]  # not the flat ones behind them
    assert (model.input.channels, model.input.height, model.input.width) == (3, 32, 32)
    assert tuple(model.input.mean) == (0.5, 0.4, 0.3)
    assert (model.input.resize, model.input.interpolation) == ("32", "bilinear")
    assert list(model.scores) == [number for number in model_pb2.Score.values() if number]
    assert len(bytes.fromhex(model.digest)) == 32


def test_an_unknown_model_is_not_found_and_a_similar_name_is_suggested(channel: grpc.Channel) -> None:
    stub = model_pb2_grpc.ModelServiceStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetModel(model_pb2.GetModelRequest(name="smalll"), timeout=TIMEOUT_S)
    assert caught.value.code() is Status.NOT_FOUND
    assert 'did you mean "small"?' in caught.value.details()


def test_a_model_of_any_size_learns_its_classes_with_its_first_rows(device: str) -> None:
    with serve(Linear(), device=device) as address, grpc.insecure_channel(address) as channel:
        models = model_pb2_grpc.ModelServiceStub(channel)
        before = models.GetModel(model_pb2.GetModelRequest(), timeout=TIMEOUT_S).model
        attribution_pb2_grpc.AttributionServiceStub(channel).Attribute(ask(floats(1)), timeout=TIMEOUT_S)
        after = models.GetModel(model_pb2.GetModelRequest(), timeout=TIMEOUT_S).model
    assert (before.class_count, after.class_count) == (0, N_CLASSES)
    assert not before.HasField("input")


def test_a_class_beyond_the_labels_has_none(device: str) -> None:
    """Without an input size labels cannot be counted against classes before the first rows ran."""
    spec = ModelSpec(Linear(), class_names=["only one"])
    with serve(spec, device=device) as address, grpc.insecure_channel(address) as channel:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
        request = ask(floats(1), target=pb.Target(index=9))
        (example,) = stub.Attribute(request, timeout=TIMEOUT_S).result.examples
    assert (example.targets[0].index, example.targets[0].label) == (9, "")


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (answer,) = stub.ServerReflectionInfo(asked, timeout=TIMEOUT_S)
    listed = {each.name for each in answer.list_services_response.service}
    assert listed == {
        "sidelight.v1.AttributionService",
        "sidelight.v1.ModelService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    }


@pytest.mark.parametrize("service", ["sidelight.v1.AttributionService", "inference.GRPCInferenceService"])
def test_reflection_answers_in_v1_what_it_answers_in_v1alpha(service: str, channel: grpc.Channel) -> None:
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
    answers = [
        list(
            channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )(iter([asked]), timeout=TIMEOUT_S)
        )
        for version in ("v1", "v1alpha")
    ]
    assert answers[0] == answers[1]
    assert answers[0][0].file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("service", ["", *SERVICES], ids=lambda name: name or "the server")
def test_health_says_serving(service: str, channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_over_the_permits_a_unary_call_gets_a_retry_delay(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, max_in_flight=1, device=device) as (gate, server):
        first = server.stub.Attribute.future(ask(floats(2)), timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as caught:
            server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
        assert caught.value.code() is Status.RESOURCE_EXHAUSTED
        assert "max_in_flight 1" in caught.value.details()
        trailers = dict(caught.value.trailing_metadata())
        assert int(trailers["retry-after-ms"]) > 0

        gate.open()
        np.testing.assert_allclose(maps_of(first.result()), linear_maps(floats(2)), **CLOSED_FORM)
        server.until_all_permits_are_back()
        assert maps_of(server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)).shape == (1, 4, 5)


def test_over_the_bytes_a_unary_call_gets_a_retry_delay(tmp_path: Path, device: str) -> None:
    batch = floats(100)
    room = 2 * (batch.nbytes + 100 * BYTES_OF_EXAMPLE)  # but not for the answers of both
    with gated(tmp_path, max_in_flight_bytes=room, device=device) as (gate, server):
        first = server.stub.Attribute.future(ask(batch), timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as caught:
            server.stub.Attribute(ask(batch), timeout=TIMEOUT_S)
        assert caught.value.code() is Status.RESOURCE_EXHAUSTED
        assert f"max_in_flight_bytes {room}" in caught.value.details()
        assert "retry-after-ms" in dict(caught.value.trailing_metadata())
        gate.open()
        assert len(first.result().result.examples) == 100


def test_a_failed_request_releases_its_permit(tmp_path: Path, device: str) -> None:
    with running(Linear(), tmp_path, max_in_flight=1, device=device) as server:
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
        for wrong in (pb.Target(index=10), pb.Target(label="cat"), pb.Target()):
            with pytest.raises(grpc.RpcError):
                server.stub.Attribute(ask(floats(1), target=wrong), timeout=TIMEOUT_S)
            server.until_all_permits_are_back()


def test_rows_whose_time_is_over_never_run(tmp_path: Path, device: str) -> None:
    with gated(tmp_path, device=device) as (gate, server):
        first = server.stub.Attribute.future(ask(floats(2)), timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as caught:
            server.stub.Attribute(ask(floats(5), timeout=BRIEF), timeout=TIMEOUT_S)
        assert caught.value.code() is Status.DEADLINE_EXCEEDED
        assert caught.value.details().startswith("timeout: ")
        gate.open()
        first.result()
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
        assert gate.n_rows == 3


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_unary_caller_that_disconnects_frees_rows_and_permit(how: str, tmp_path: Path, device: str) -> None:
    with gated(tmp_path, max_in_flight=2, device=device) as (gate, server):
        first = server.stub.Attribute.future(ask(floats(1)), timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        second = server.stub.Attribute.future(ask(floats(5)), timeout=0.2 if how == "deadline" else TIMEOUT_S)
        if how == "cancel":
            # A later call is answered, so this one has arrived.
            server.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=TIMEOUT_S)
            second.cancel()
        with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
            second.result()
        first.cancel()
        with pytest.raises((grpc.FutureCancelledError, concurrent.futures.CancelledError)):
            first.result()

        server.until_all_permits_are_back()
        gate.open()
        server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
        assert gate.n_rows == 2


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() == 0:
            raise RuntimeError("the password is swordfish")
        return x.flatten(1)[:, :2]


def test_what_fails_in_a_model_is_logged_and_not_reported(
    device: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with (
        caplog.at_level(logging.ERROR, logger="sidelight"),
        serve(Failing(), device=device, name="frail", listen=(f"unix:{tmp_path}/for-others",)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        assert not stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S).result.failures
        (failure,) = stub.Attribute(ask(np.zeros_like(floats(1))), timeout=TIMEOUT_S).result.failures
    assert failure.code == Status.INTERNAL.value[0]
    assert 'model "frail" failed on example 0' in failure.message
    assert "swordfish" not in failure.message
    assert "swordfish" in caplog.text


def test_why_a_model_has_never_run_is_logged(device: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Then it is unknown whether the shape or the model is wrong."""
    with (
        caplog.at_level(logging.WARNING, logger="sidelight"),
        serve(Failing(), device=device, name="frail", listen=(f"unix:{tmp_path}/for-others",)) as address,
        grpc.insecure_channel(address) as channel,
    ):
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        (failure,) = stub.Attribute(ask(np.zeros_like(floats(1))), timeout=TIMEOUT_S).result.failures
    assert failure.code == Status.INVALID_ARGUMENT.value[0]
    assert "swordfish" not in failure.message
    assert "Traceback" in caplog.text


def test_what_fails_in_the_server_is_logged_and_not_reported(
    device: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Short(nn.Module):
        """Its first two elements are its logits."""

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2]

    with caplog.at_level(logging.ERROR, logger="sidelight"), running(Short(), tmp_path, device=device) as server:
        model = next(iter(server.engine.models.values()))
        model.labels = (object(), object())  # more than any message can hold
        with pytest.raises(grpc.RpcError) as caught:
            server.stub.Attribute(ask(floats(1), id="a\nb"), timeout=TIMEOUT_S)
        model.labels = ()
        assert not server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S).result.failures
        server.until_all_permits_are_back()
    assert caught.value.code() is Status.INTERNAL
    assert caught.value.details() == "the server failed; its log has the cause"
    assert 'event=unexpected id="a\\nb"' in caplog.text


def test_invalid_bytes_are_refused_and_end_no_stream(address: str) -> None:
    junk, good = b"\xff\xff\xff", pb.AttributeStreamRequest(cancel=pb.CancelRequest(id="unknown"))
    with grpc.insecure_channel(address) as channel:
        unary = channel.unary_unary("/sidelight.v1.AttributionService/Attribute")
        with pytest.raises(grpc.RpcError) as caught:
            unary(junk, timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "message: 3 bytes that cannot be decoded"
        stream = channel.stream_stream(
            "/sidelight.v1.AttributionService/AttributeStream",
            response_deserializer=pb.AttributeStreamResponse.FromString,
        )
        answers = list(stream(iter([junk, good.SerializeToString(), junk]), timeout=TIMEOUT_S))
    assert [(answer.id, answer.failure.code) for answer in answers] == [("", 3), ("", 3)]
