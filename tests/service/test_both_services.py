"""Properties of both services: tokens, limits, permits, deadlines, cancellation, the drain and health."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from sidelight.v1 import attribution_pb2 as pb
from sidelight_server import Engine, ModelSpec, Settings
from sidelight_server.interop.open_inference import inference_pb2 as oip

from support.certificates import Authority, secret
from support.messages.attribution import BRIEF, ask, floats, linear_maps, maps_of
from support.messages.inference import SERVICE, infer_request, tensors_of
from support.models import Linear
from support.servers.counters import count_of
from support.servers.running import TIMEOUT_S, gated, running, serving
from support.tolerances import CLOSED_FORM
from support.waiting import until

Status = grpc.StatusCode
BRIEF_US = BRIEF.nanos // 1000

Explain = Callable[..., grpc.Future]


def by_sidelight(channel: grpc.Channel, images: np.ndarray, *, brief: bool = False, **options: Any) -> grpc.Future:
    method = channel.unary_unary(
        "/sidelight.v1.AttributionService/Attribute",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=lambda raw: maps_of(pb.AttributeResponse.FromString(raw)),
    )
    return method.future(ask(images, **({"timeout": BRIEF} if brief else {})), **{"timeout": TIMEOUT_S} | options)


def by_inference(channel: grpc.Channel, images: np.ndarray, *, brief: bool = False, **options: Any) -> grpc.Future:
    method = channel.unary_unary(
        SERVICE + "ModelInfer",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=lambda raw: tensors_of(oip.ModelInferResponse.FromString(raw))["maps"],
    )
    request = infer_request(images, outputs=["maps"], parameters={"timeout": BRIEF_US} if brief else {})
    return method.future(request, **{"timeout": TIMEOUT_S} | options)


both = pytest.mark.parametrize("explain", [by_sidelight, by_inference], ids=["sidelight.v1", "inference"])


def code_of(call: grpc.Future) -> Status:
    assert call.exception(TIMEOUT_S)
    return call.code()


@both
@pytest.mark.parametrize(
    ("token", "code"), [(None, Status.UNAUTHENTICATED), ("no", Status.UNAUTHENTICATED), ("yes", None)]
)
def test_a_token_is_needed(explain: Explain, token: str | None, code: Status | None, tmp_path: Path) -> None:
    with running(Linear(), tmp_path, device="cpu", tokens=secret(tmp_path / "tokens", "yes\n")) as server:
        metadata = [("authorization", f"Bearer {token}")] if token else []
        call = explain(server.channel, floats(1), metadata=metadata)
        if code:
            assert code_of(call) is code
        else:
            assert call.result().shape == (1, 4, 5)


@both
def test_the_service_uses_tls(explain: Explain, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    pair = authority.pair()
    settings = Settings(device="cpu", threads=1, tls_certificate=pair.certificate, tls_key=pair.key)
    with serving(Engine([ModelSpec(Linear())], settings), "127.0.0.1:0") as server:
        credentials = grpc.ssl_channel_credentials(authority.path.read_bytes())
        with grpc.secure_channel(server.server.addresses[0], credentials) as channel:
            np.testing.assert_allclose(explain(channel, floats(1)).result(), linear_maps(floats(1)), **CLOSED_FORM)


@both
def test_over_the_permits_a_call_gets_a_retry_delay(explain: Explain, tmp_path: Path) -> None:
    with gated(tmp_path, max_in_flight=1, device="cpu") as (gate, server):
        first = explain(server.channel, floats(1))
        assert gate.reached.wait(TIMEOUT_S)
        second = explain(server.channel, floats(1))
        assert code_of(second) is Status.RESOURCE_EXHAUSTED
        assert "max_in_flight 1" in second.details()
        assert dict(second.trailing_metadata())["retry-after-ms"] == "250"
        gate.open()
        assert first.result().shape == (1, 4, 5)
        server.until_all_permits_are_back()


@both
def test_a_message_or_an_answer_that_is_too_large_is_refused(explain: Explain, tmp_path: Path) -> None:
    with running(Linear(), tmp_path, device="cpu", max_message_bytes=4096) as server:
        assert code_of(explain(server.channel, floats(20))) is Status.RESOURCE_EXHAUSTED
        assert explain(server.channel, floats(1)).result().shape == (1, 4, 5)


@both
def test_a_deadline_drops_the_rows(explain: Explain, tmp_path: Path) -> None:
    with gated(tmp_path, device="cpu") as (gate, server):
        late, cancelled = (
            explain(server.channel, floats(1), brief=True),
            explain(server.channel, floats(1), timeout=0.1),
        )
        assert code_of(late) is Status.DEADLINE_EXCEEDED
        assert code_of(cancelled) is Status.DEADLINE_EXCEEDED
        until(server, lambda: server.server.handler.admission.n_requests == 0)
        gate.open()
        server.until_all_permits_are_back()


@both
def test_a_caller_that_disconnects_frees_rows_and_permit(explain: Explain, tmp_path: Path) -> None:
    with gated(tmp_path, device="cpu") as (gate, server):
        call = explain(server.channel, floats(1))
        assert gate.reached.wait(TIMEOUT_S)
        call.cancel()
        until(server, lambda: server.server.handler.admission.n_requests == 0)
        gate.open()
        server.until_all_permits_are_back()


@both
def test_a_call_that_is_not_answered_within_the_drain_fails(explain: Explain, tmp_path: Path) -> None:
    with gated(tmp_path, device="cpu") as (gate, server):
        call = explain(server.channel, floats(1))
        assert gate.reached.wait(TIMEOUT_S)
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(drain_s=0.5), server.loop)
        assert code_of(call) is Status.UNAVAILABLE
        assert "drain_s" in call.details()
        gate.open()
        stopping.result(TIMEOUT_S)


@both
def test_a_batch_is_counted_once(explain: Explain, tmp_path: Path) -> None:
    with running(Linear(), tmp_path, device="cpu") as server:
        explain(server.channel, floats(1)).result()
        name = {by_sidelight: "Attribute", by_inference: "ModelInfer"}[explain]
        telemetry = server.server.handler.telemetry
        until(server, lambda: count_of(telemetry, "sidelight_requests_total", call=name, code="OK") == 1)
