"""The shutdown of a server with running requests."""

import asyncio
import signal
from pathlib import Path

import grpc
import pytest
from sidelight.v1 import attribution_pb2_grpc
from sidelight_server import Engine, Settings
from sidelight_server.config.model_settings import ModelSettings
from sidelight_server.errors import Unavailable

from support.messages.attribution import ask, attribute, floats
from support.messages.conversation import Conversation
from support.models.gate import Gate
from support.models.reloadable import SOURCE, write_weights
from support.servers.health import HANGING, NOT_SERVING, PICTURES, SERVING, UNAVAILABLE, Watching, check, gated
from support.servers.processes import start, started
from support.servers.running import TIMEOUT_S, serving


def test_running_requests_are_answered_while_the_server_drains_and_new_ones_are_refused(
    tmp_path: Path, gate: Gate
) -> None:
    with serving(gated(gate), f"unix:{tmp_path}/socket") as server, Conversation(server.channel) as stream:
        watching = Watching(server.channel)
        assert watching.next() == SERVING
        gate.shut()
        stream.send(attribute("running", PICTURES))
        assert gate.reached.wait(TIMEOUT_S)
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(drain_s=TIMEOUT_S), server.loop)
        assert watching.rest() == [NOT_SERVING]  # notified, then ended: a watcher must not delay the shutdown
        gate.open()
        answers, status, cause = stream.end()
        assert [answer.id for answer in answers] == ["running"]
        assert answers[0].WhichOneof("outcome") == "result"
        assert (status, cause) == (grpc.StatusCode.UNAVAILABLE, "shutdown")
        assert stopping.result(TIMEOUT_S)


def test_a_batch_that_is_not_answered_in_time_fails_with_its_id(tmp_path: Path, gate: Gate) -> None:
    engine = gated(gate, max_stream_in_flight=2)
    with serving(engine, f"unix:{tmp_path}/socket") as server, Conversation(server.channel) as stream:
        gate.shut()
        stream.send(*(attribute(f"{n}", PICTURES) for n in range(3)))  # one more than there are slots
        unary = server.stub.Attribute.future(ask(PICTURES), timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        server.run(_until(lambda: engine.n_unanswered == 3 and server.counts().unanswered == 3))
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(drain_s=0.5), server.loop)
        answers, status, cause = stream.end()
        assert sorted(answer.id for answer in answers) == ["0", "1", "2"]
        assert {answer.failure.code for answer in answers} == {UNAVAILABLE}
        assert all("drain_s" in answer.failure.message for answer in answers)
        assert (status, cause) == (grpc.StatusCode.UNAVAILABLE, "shutdown")
        assert unary.code() is grpc.StatusCode.UNAVAILABLE
        assert "drain_s" in unary.details()
        gate.open()
        assert stopping.result(TIMEOUT_S)


async def _until(reached: object) -> None:
    while not reached():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def test_a_reload_is_refused_while_the_server_drains(tmp_path: Path) -> None:
    weights = tmp_path / "net.safetensors"
    write_weights(weights, seed=1)
    engine = Engine([ModelSettings(model=SOURCE, weights=weights, name="net")], Settings(device="cpu", threads=1))
    with serving(engine, f"unix:{tmp_path}/socket") as server:
        server.run(server.server.stop(drain_s=0))
        with pytest.raises(Unavailable, match="shutting down"):
            server.run(engine.registry.reload("net"))
        assert engine.models["net"].version == 1


def test_a_second_signal_ends_a_process_at_once(folder: Path) -> None:
    with started(folder, *HANGING) as (process, (address,)), grpc.insecure_channel(address) as channel:
        stub = attribution_pb2_grpc.AttributionServiceStub(channel)
        call = stub.Attribute.future(ask(floats(1, shape=(3, 4, 4))), timeout=TIMEOUT_S)
        (folder / "reached").open().close()
        process.send_signal(signal.SIGTERM)
        assert "event=stopping" in process.stderr.readline()
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == -signal.SIGTERM
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_a_process_that_is_loading_ends_at_a_signal(folder: Path) -> None:
    with start(folder, "--model", "python:factories:loading", "--listen", "unix:s", "--device", "cpu") as process:
        (folder / "reached").open().close()
        with grpc.insecure_channel(f"unix:{folder}/s") as channel:
            assert check(channel) == NOT_SERVING
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        (line,) = process.stderr.read().splitlines()
        assert "event=stopping signal=SIGTERM" in line
    assert not (folder / "s").exists()
