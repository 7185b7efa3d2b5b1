"""Models that are loaded with their first request, and the requests that wait for them."""

import contextlib
import gc
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import sidelight
import sidelight_server
from google.protobuf.duration_pb2 import Duration
from sidelight_server import Engine, ModelSpec, Settings

from support.messages.attribution import BRIEF, attribute, cancel
from support.messages.conversation import Conversation
from support.models import reloadable
from support.models.gate import Gate
from support.models.reloadable import SOURCE
from support.servers.running import Running
from support.servers.running import serving as running_server
from support.servers.several_models import FLOATS, assert_close, maps_of, serving


def test_a_lazy_model_is_loaded_by_its_first_request(weights: Path) -> None:
    gc.collect()
    before = len(reloadable.alive)
    models = {"now": {"load": "eager"}, "later": {}}
    with serving(model=SOURCE, weights=weights, load="lazy", models=models) as client:
        assert len(reloadable.alive) == before + 1
        assert [(each.name, each.state) for each in client.info().models] == [("now", "serving"), ("later", "unloaded")]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: client.attribute(FLOATS, model="later"), range(8)))
        assert {answer.provenance.model_version for answer in answers} == {1}  # loaded once for all waiting calls
        for answer in answers:
            assert_close(answer.maps, maps_of(1))
        assert client.model("later").state == "serving"
        assert client.model("later").warmup


def test_a_lazy_model_that_cannot_be_loaded_fails_its_callers_alone(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    models = {"good": {}, "bad": {"load": "lazy", "weights": bad}}
    with caplog.at_level(logging.ERROR), serving(model=SOURCE, weights=weights, models=models) as client:
        for _ in range(2):
            with pytest.raises(sidelight.FailedPrecondition, match="could not be loaded") as caught:
                client.attribute(FLOATS, model="bad")
            assert str(tmp_path) not in str(caught.value)  # callers must not see the operator's paths
        assert caplog.text.count("bad.safetensors") == 1  # the load is tried once, not by every caller
        assert client.model("bad").state == "failed"
        assert not client.attribute(FLOATS, model="good").failures
        (answer,) = client.stream([FLOATS], model="good")
        assert not answer.failures


def test_waiting_for_a_lazy_model_is_within_the_batch_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go = threading.Event(), threading.Event()

    def slow() -> ModelSpec:
        loading.set()
        assert go.wait(30)
        return reloadable.net()

    monkeypatch.setattr(reloadable, "slow", slow, raising=False)
    with serving(models={"slow": {"model": "python:support.models.reloadable:slow", "load": "lazy"}}) as client:
        with pytest.raises(sidelight.DeadlineExceeded):
            client.attribute(FLOATS, timeout=0.3)
        assert loading.wait(20)
        go.set()
        assert not client.attribute(FLOATS).failures  # the load was kept, although its caller had timed out


@contextlib.contextmanager
def _conversing(
    monkeypatch: pytest.MonkeyPatch, gate: Gate, **settings: object
) -> Iterator[tuple[Running, Conversation]]:
    """A stream to a server with a loaded model, and another whose factory waits at the gate."""

    def slow() -> ModelSpec:
        gate.wait(0)
        return reloadable.net()

    monkeypatch.setattr(reloadable, "slow", slow, raising=False)
    models = {"there": {"model": SOURCE}, "slow": {"model": "python:support.models.reloadable:slow", "load": "lazy"}}
    chosen = Settings(models=models, device="cpu", threads=1, **settings)
    engine = Engine(list(chosen.of_models().values()), chosen)
    with running_server(engine, "127.0.0.1:0") as server, Conversation(server.channel) as stream:
        gate.shut()
        yield server, stream


def test_loading_a_model_delays_neither_other_batches_of_a_stream_nor_a_cancel(
    monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    with _conversing(monkeypatch, gate) as (server, stream):
        stream.send(*(attribute(f"slow {n}", FLOATS, model="slow") for n in range(3)))
        assert gate.reached.wait(20)
        stream.send(attribute("there", FLOATS, model="there"))
        assert stream.receive().id == "there"
        stream.send(cancel("slow 1"))
        answer = stream.receive()
        assert (answer.id, answer.failure.code) == ("slow 1", grpc.StatusCode.CANCELLED.value[0])
        stream.send(attribute("slow 2", FLOATS, model="slow"))  # which is not answered yet
        answer = stream.receive()
        assert (answer.id, answer.failure.code) == ("slow 2", grpc.StatusCode.INVALID_ARGUMENT.value[0])
        gate.open()
        answers = stream.finish()
        assert sorted(answer.id for answer in answers) == ["slow 0", "slow 2"]
        assert [answer.WhichOneof("outcome") for answer in answers] == ["result"] * 2
        server.until_all_permits_are_back()


def test_batches_that_wait_for_their_model_take_their_streams_slots(
    monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """So the memory that a caller can make the server hold stays bounded."""
    with _conversing(monkeypatch, gate, max_stream_in_flight=2) as (_, stream):
        stream.send(*(attribute(f"slow {n}", FLOATS, model="slow") for n in range(2)))
        assert gate.reached.wait(20)
        stream.send(attribute("there", FLOATS, model="there"), cancel("slow 1"))
        assert stream.receive().id == "slow 1"
        assert stream.receive().id == "there"  # in the slot that was released
        gate.open()
        assert [answer.id for answer in stream.finish()] == ["slow 0"]


def test_messages_that_wait_for_their_model_hold_permits(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    with _conversing(monkeypatch, gate, max_in_flight=1) as (server, stream):
        stream.send(*(attribute(f"slow {n}", FLOATS, model="slow") for n in range(2)))
        refused = stream.receive()
        assert (refused.id, refused.failure.code) == ("slow 1", grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert refused.failure.HasField("retry_delay")
        gate.open()
        answers = stream.finish()
        assert [(answer.id, answer.WhichOneof("outcome")) for answer in answers] == [("slow 0", "result")]
        server.until_all_permits_are_back()


def test_a_fault_of_a_batch_is_reported_although_its_model_must_be_loaded(
    monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    with _conversing(monkeypatch, gate) as (_, stream):
        stream.send(
            attribute("wrong", FLOATS, model="slow", timeout=Duration(seconds=-1)),
            attribute("late", FLOATS, model="slow", timeout=BRIEF),
        )
        answers = {answer.id: answer.failure.code for answer in (stream.receive(), stream.receive())}
        assert answers == {
            "wrong": grpc.StatusCode.INVALID_ARGUMENT.value[0],
            "late": grpc.StatusCode.DEADLINE_EXCEEDED.value[0],
        }
        gate.open()
        stream.send(attribute("in time", FLOATS, model="slow"))
        assert [answer.WhichOneof("outcome") for answer in stream.finish()] == ["result"]


def test_a_lazy_model_needs_a_name() -> None:
    with (
        pytest.raises(sidelight_server.ConfigurationError, match=r"load: lazy, .* set name"),
        serving(model=SOURCE, load="lazy"),
    ):
        pytest.fail("it has started")
