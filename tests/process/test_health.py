"""Health: when it is SERVING, stuck devices, and the shutdown of a server with running requests."""

import asyncio
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, model_pb2, model_pb2_grpc
from sidelight_server import Engine, ModelSpec, Request, Settings
from sidelight_server.app.health.health import SERVICES
from sidelight_server.app.health.watchdog import Watchdog
from sidelight_server.app.server import Server
from sidelight_server.config.model_settings import ModelSettings
from sidelight_server.engine.devices.device import least_busy
from sidelight_server.engine.devices.heartbeat import STUCK_FACTOR, Heartbeat
from sidelight_server.errors import Unavailable

from support.messages.attribution import ask, attribute, floats
from support.messages.conversation import Conversation
from support.models import Linear
from support.models.gate import Gate, Gated
from support.models.reloadable import SIZE, SOURCE, write_weights
from support.servers.counters import count_of
from support.servers.processes import FACTORIES, LOCAL, start, started
from support.servers.running import TIMEOUT_S, serving

Status = health_pb2.HealthCheckResponse
SERVING, NOT_SERVING, SERVICE_UNKNOWN = Status.SERVING, Status.NOT_SERVING, Status.SERVICE_UNKNOWN
UNAVAILABLE = 14
STUCK_S = 0.5
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


class Watching:
    """A Watch that a test reads."""

    def __init__(self, channel: grpc.Channel, service: str = "") -> None:
        request = health_pb2.HealthCheckRequest(service=service)
        self._call = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=TIMEOUT_S, wait_for_ready=True)

    def next(self) -> int:
        return next(self._call).status

    def leave(self) -> None:
        self._call.cancel()

    def rest(self) -> list[int]:
        """Return the remaining statuses until the server ends the call, which must end with OK."""
        statuses = [each.status for each in self._call]
        assert self._call.code() is grpc.StatusCode.OK
        return statuses


def check(channel: grpc.Channel, service: str = "") -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    return health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S, wait_for_ready=True).status


def linear(**settings: object) -> Engine:
    return Engine([ModelSpec(Linear(), name="linear")], Settings(device="cpu", threads=1, **settings))


def gated(gate: Gate, **settings: object) -> Engine:
    chosen = {"device": "cpu", "threads": 1, "max_chunk_rows": 1} | settings
    return Engine([ModelSpec(Gated(gate), input_size=SIZE, name="gated")], Settings(**chosen))


# Names


def test_the_server_its_services_and_its_models_have_a_name_each(tmp_path: Path) -> None:
    with serving(linear(), f"unix:{tmp_path}/socket") as server:
        for name in ("", *SERVICES, "model/linear"):
            assert check(server.channel, name) == SERVING, name


@pytest.mark.parametrize(
    "name", ["linear", "model/", "model/other", "sidelight.v1", "grpc.health.v1.Health", "é" * 900]
)
def test_another_name_is_unknown(name: str, tmp_path: Path) -> None:
    with serving(linear(), f"unix:{tmp_path}/socket") as server:
        with pytest.raises(grpc.RpcError) as caught:
            check(server.channel, name)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watching = Watching(server.channel, name)
        assert watching.next() == SERVICE_UNKNOWN
        watching.leave()


# The life


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
                asking.start()  # which waits, as for a server that is not there yet
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


# Stuck and dead


def test_a_stuck_device_is_reported_and_so_is_that_it_moves_again(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        serving(gated(gate, stuck_s=STUCK_S), f"unix:{tmp_path}/socket") as server,
        caplog.at_level(logging.INFO, "sidelight"),
    ):
        gate.shut()
        watches = [Watching(server.channel, name) for name in ("", SERVICES[0], "model/gated")]
        assert [each.next() for each in watches] == [SERVING] * 3
        call = server.stub.Attribute.future(ask(PICTURES), timeout=TIMEOUT_S)
        assert [each.next() for each in watches] == [NOT_SERVING] * 3
        gate.open()
        assert [each.next() for each in watches] == [SERVING] * 3
        assert not call.result().result.failures
        for each in watches:
            each.leave()
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert events[:2] == ["event=device_stuck", "event=device_moves"]


def test_without_the_setting_nothing_is_stuck(gate: Gate) -> None:
    with gated(gate, stuck_s=0) as engine:
        assert not engine.devices[0].worker.heartbeat.is_stuck


def test_one_device_of_two_keeps_the_server_serving_and_gets_all_that_is_new(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    engine = gated(gate, device="cpu,cpu", stuck_s=STUCK_S)
    with serving(engine, f"unix:{tmp_path}/socket") as server:
        here, there = engine.devices
        gate.shut()
        held = server.stub.Attribute.future(ask(PICTURES), timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        heartbeat = here.worker.heartbeat
        heartbeat._beat_s -= heartbeat.limit_s + 1  # as long ago as that
        watchdog = Watchdog(engine, on_check=lambda: None)
        watchdog.check()
        assert (here.is_responsive, there.is_responsive) == (False, True)
        assert check(server.channel) == SERVING
        assert least_busy([here, there]) is there
        there.n_rows += 10**6  # busy is better than stuck
        assert least_busy([here, there]) is there
        there.n_rows -= 10**6
        gate.open()
        assert not held.result().result.failures


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_device_thread_that_died_serves_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = linear()
    with serving(engine, f"unix:{tmp_path}/socket") as server:
        watching = Watching(server.channel)
        assert watching.next() == SERVING

        def die() -> None:
            raise SystemExit

        worker = engine.devices[0].worker
        with worker._changed:
            worker._tasks.append((die, None))
            worker._changed.notify()
        assert watching.next() == NOT_SERVING
        watching.leave()
        with pytest.raises(grpc.RpcError) as caught:
            server.stub.Attribute(ask(floats(1)), timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "event=device_thread_ended" in caplog.text


# The pulse, by a clock of its own


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_thread_at_rest_is_never_stuck(clock: Clock) -> None:
    heartbeat = Heartbeat(stuck_s=5, clock=clock)
    clock.now_s += 1000
    assert not heartbeat.is_stuck
    heartbeat.beat()
    clock.now_s += 1
    heartbeat.rest()
    clock.now_s += 1000
    assert not heartbeat.is_stuck
    assert heartbeat.longest_s == 1


@pytest.mark.parametrize(("chunk_s", "limit_s"), [(0.1, 5), (0.4, 5), (2.0, 20)])
def test_the_limit_is_the_setting_or_ten_times_the_longest_chunk(chunk_s: float, limit_s: float, clock: Clock) -> None:
    heartbeat = Heartbeat(stuck_s=5, clock=clock)
    for took_s in (chunk_s, chunk_s / 2):
        heartbeat.beat()
        clock.now_s += took_s
    heartbeat.beat()
    assert heartbeat.limit_s == pytest.approx(max(5, STUCK_FACTOR * chunk_s))
    clock.now_s += limit_s - 0.01
    assert not heartbeat.is_stuck
    clock.now_s += 0.02
    assert heartbeat.is_stuck
    heartbeat.beat()
    assert not heartbeat.is_stuck


def test_what_was_stuck_and_what_was_an_errand_does_not_make_the_limit_longer(clock: Clock) -> None:
    heartbeat = Heartbeat(stuck_s=5, clock=clock)
    heartbeat.beat()
    clock.now_s += 1000
    heartbeat.beat()
    clock.now_s += 4
    heartbeat.rest(extends_limit=False)
    assert heartbeat.limit_s == 5


# The end


def test_running_work_is_answered_while_the_server_drains_and_nothing_new_is_let_in(tmp_path: Path, gate: Gate) -> None:
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


def test_an_engine_whose_device_is_stuck_can_be_left(gate: Gate) -> None:
    engine = gated(gate)
    engine.start()
    gate.shut()

    def ask_in_vain() -> None:
        with pytest.raises(Unavailable):
            asyncio.run(engine.attribute(Request(PICTURES)))

    asking = threading.Thread(target=ask_in_vain)
    asking.start()
    assert gate.reached.wait(TIMEOUT_S)
    assert not engine.close(within_s=0.01)
    gate.open()
    assert engine.close()
    asking.join(TIMEOUT_S)
    assert not asking.is_alive()


# Processes

SLOW = """
class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        import time
        open("reached", "w").close()  # a pipe, which waits for its other end
        time.sleep(600)
        return self.net(x)

def loading():
    open("reached", "w").close()
    import time
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "factories.py").write_text(FACTORIES + SLOW)
    os.mkfifo(tmp_path / "reached")
    return tmp_path


HANGING = ["--model", "python:factories:Slow", *LOCAL, "--device", "cpu"]


def test_a_process_with_a_stuck_device_ends_with_0_in_time_and_fails_its_callers(folder: Path) -> None:
    with started(folder, *HANGING, "--drain-s", "1", "--stuck-s", "0.2") as (process, (address,)):
        with grpc.insecure_channel(address) as channel, Conversation(channel) as stream:
            watching = Watching(channel)
            assert watching.next() == SERVING
            stream.send(attribute("lost", floats(1, shape=(3, 4, 4))))
            (folder / "reached").open().close()
            assert watching.next() == NOT_SERVING
            process.send_signal(signal.SIGTERM)
            answers, status, cause = stream.end()
            assert [(answer.id, answer.failure.code) for answer in answers] == [("lost", UNAVAILABLE)]
            assert (status, cause) == (grpc.StatusCode.UNAVAILABLE, "shutdown")
        assert process.wait(TIMEOUT_S) == 0
        output = process.stderr.read()
    events = [word for word in output.split() if word.startswith("event=")]
    assert events == ["event=device_stuck", "event=stopping", "event=device_abandoned"]


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


# The probe


def probe(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "sidelight_server", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.strip()


def test_the_probe_says_how_a_server_is(tmp_path: Path, gate: Gate) -> None:
    address = f"unix:{tmp_path}/socket"
    with serving(gated(gate), f"unix:{tmp_path}/socket") as server:
        assert probe("--check", address) == (0, "SERVING")
        assert probe(f"--check={address}", "--service", "model/gated") == (0, "SERVING")
        assert probe("--check", SIDELIGHT_LISTEN=f"{address},127.0.0.1:1") == (0, "SERVING")
        code, output = probe("--check", address, "--service", "model/other")
        assert code == 1
        assert output.startswith("NOT_FOUND")
        server.server._is_stopping = True
        server.run(_told(server.server))
        assert probe("--check", address) == (1, "NOT_SERVING")
        server.server._is_stopping = False
    code, output = probe("--check", address)
    assert code == 1
    assert output.startswith("UNAVAILABLE")


async def _told(server: Server) -> None:
    server._update_health()


@pytest.mark.parametrize(
    ("flags", "code", "fragment"),
    [
        (("--certificate", "c.pem"), 2, "--certificate and --key go together"),
        (("--key", "k.pem"), 2, "--certificate and --key go together"),
        (("--server-name", "there"), 2, "expected --ca too"),
        (("--ca", "absent.pem"), 1, "No such file or directory: 'absent.pem'"),
        (("--ca", __file__), 1, "holds no PEM certificate"),
        (("--certificate", __file__, "--key", __file__), 1, "are not a pair of a PEM certificate and its key"),
    ],
)
def test_a_probe_that_is_asked_wrongly_says_so(flags: tuple[str, ...], code: int, fragment: str) -> None:
    ended, output = probe("--check", "127.0.0.1:1", *flags)
    assert ended == code
    assert fragment in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("listen", "first"),
    [
        ("[::]:1", "[::]:1"),
        ("[::1]:1,127.0.0.1:2", "[::1]:1"),
        ('["[::1]:1", "127.0.0.1:2"]', "[::1]:1"),
        (" 127.0.0.1:1 , [::1]:2", "127.0.0.1:1"),
    ],
)
def test_the_probe_asks_the_first_address_that_the_server_listens_on(listen: str, first: str) -> None:
    code, output = probe("--check", SIDELIGHT_LISTEN=listen)
    assert code == 1
    assert output.startswith(f"UNAVAILABLE: {first}: ")


def test_the_probe_brings_no_torch() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--check', '127.0.0.1:1'];"
        "from sidelight_server.__main__ import main; assert main() == 1;"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_public_name_that_is_not_there_is_an_attribute_error() -> None:
    import sidelight_server

    assert set(sidelight_server.__all__) <= set(dir(sidelight_server))
    for name in sidelight_server.__all__:
        assert getattr(sidelight_server, name) is not None
    with pytest.raises(AttributeError, match="Engin"):
        _ = sidelight_server.Engin
