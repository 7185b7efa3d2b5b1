"""Health: when the server, its services and its models are SERVING."""

import os
import queue
import sys
import threading
from pathlib import Path

import grpc
import pytest
import sidelight
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc
from sidelight_server import Engine, Settings
from sidelight_server.app.health.health import SERVICES
from sidelight_server.config.model_settings import ModelSettings

from support.messages.attribution import ask, floats
from support.models.gate import Gate
from support.models.reloadable import SOURCE, write_weights
from support.servers.counters import count_of
from support.servers.health import (
    NOT_SERVING,
    PICTURES,
    SERVICE_UNKNOWN,
    SERVING,
    STUCK_S,
    Watching,
    check,
    gated,
    linear,
)
from support.servers.running import TIMEOUT_S, serving


def test_the_server_its_services_and_its_models_have_a_name_each(tmp_path: Path) -> None:
    with serving(linear(), f"unix:{tmp_path}/socket") as server:
        for name in ("", *SERVICES, "model/linear"):
            assert check(server.channel, name) == SERVING, name


@pytest.mark.parametrize(
    "name", ["linear", "model/", "model/other", "sidelight.v1", "grpc.health.v1.Health", "é" * 900]
)
def test_an_unknown_service_name_is_service_unknown(name: str, tmp_path: Path) -> None:
    with serving(linear(), f"unix:{tmp_path}/socket") as server:
        with pytest.raises(grpc.RpcError) as caught:
            check(server.channel, name)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watching = Watching(server.channel, name)
        assert watching.next() == SERVICE_UNKNOWN
        watching.leave()


def test_the_port_answers_health_while_models_load_and_rejects_other_calls(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    (tmp_path / "waiting_factory.py").write_text(f"def net():\n    open({str(fifo)!r}).close()\n" + NET)
    sys.path.insert(0, str(tmp_path))
    settings = Settings(device="cpu", threads=1, stuck_s=STUCK_S)
    engine = Engine([ModelSettings(model="python:waiting_factory:net", name="slow")], settings, load=False)
    try:
        with serving(engine, f"unix:{tmp_path}/socket", started=False) as server:
            names = ("", "model/slow")
            watches = [Watching(server.channel, name) for name in names]
            assert [each.next() for each in watches] == [NOT_SERVING, NOT_SERVING]
            stub = attribution_pb2_grpc.AttributionServiceStub(server.channel)
            for call in (
                lambda: stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S),
                lambda: stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=TIMEOUT_S),
                lambda: next(stub.AttributeStream(iter([]), timeout=TIMEOUT_S)),
                lambda: model_pb2_grpc.ModelServiceStub(server.channel).ListModels(model_pb2.ListModelsRequest()),
            ):
                with pytest.raises(grpc.RpcError, match="the server is starting") as caught:
                    call()
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert dict(caught.value.trailing_metadata())["retry-after-ms"] == "1000"
            telemetry = server.server.handler.telemetry
            assert count_of(telemetry, "sidelight_refused_calls_total", code="UNAVAILABLE") == 4
            with sidelight.connect(f"unix:{tmp_path}/socket", connect_timeout=TIMEOUT_S) as client:
                answers: queue.SimpleQueue[sidelight.Attribution] = queue.SimpleQueue()
                asking = threading.Thread(target=lambda: answers.put(client.attribute(floats(1))))
                asking.start()  # the call waits, as for a server that has not started
                fifo.open("w").close()
                assert [each.next() for each in watches] == [SERVING, SERVING]
                assert not answers.get(timeout=TIMEOUT_S).failures
                asking.join()
            for each in watches:
                each.leave()
    finally:
        sys.path.remove(str(tmp_path))


NET = """    import torch
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 10))
"""


def test_nothing_serves_before_the_warm_up_has_ended(tmp_path: Path, gate: Gate) -> None:
    engine = gated(gate)
    gate.shut()
    with serving(engine, f"unix:{tmp_path}/socket", started=False) as server:
        watching = Watching(server.channel, "model/gated")
        assert watching.next() == NOT_SERVING
        assert gate.reached.wait(TIMEOUT_S)
        assert check(server.channel) == NOT_SERVING
        gate.open()
        assert watching.next() == SERVING
        watching.leave()


def test_a_lazy_model_serves_once_it_was_asked_for_and_the_server_before(tmp_path: Path) -> None:
    weights = tmp_path / "net.safetensors"
    write_weights(weights, seed=1)
    offered = ModelSettings(model=SOURCE, weights=weights, name="lazy", load="lazy")
    with serving(Engine([offered], Settings(device="cpu", threads=1)), f"unix:{tmp_path}/socket") as server:
        assert check(server.channel) == SERVING
        watching = Watching(server.channel, "model/lazy")
        assert watching.next() == NOT_SERVING
        with sidelight.connect(f"unix:{tmp_path}/socket") as client:
            client.attribute(PICTURES, model="lazy")
        assert watching.next() == SERVING
        watching.leave()
