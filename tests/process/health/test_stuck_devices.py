"""Devices that are stuck or whose thread died, and how the watchdog detects them."""

import asyncio
import logging
import signal
import threading
from pathlib import Path

import grpc
import pytest
from sidelight_server import Request
from sidelight_server.app.health.health import SERVICES
from sidelight_server.app.health.watchdog import Watchdog
from sidelight_server.engine.devices.device import least_busy
from sidelight_server.engine.devices.heartbeat import STUCK_FACTOR, Heartbeat
from sidelight_server.errors import Unavailable

from support.messages.attribution import ask, attribute, floats
from support.messages.conversation import Conversation
from support.models.gate import Gate
from support.servers.health import (
    HANGING,
    NOT_SERVING,
    PICTURES,
    SERVING,
    STUCK_S,
    UNAVAILABLE,
    Watching,
    check,
    gated,
    linear,
)
from support.servers.processes import started
from support.servers.running import TIMEOUT_S, serving


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


def test_with_one_of_two_devices_stuck_the_server_serves_and_the_other_gets_new_requests(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    engine = gated(gate, device="cpu,cpu", stuck_s=STUCK_S)
    with serving(engine, f"unix:{tmp_path}/socket") as server:
        here, there = engine.devices
        gate.shut()
        held = server.stub.Attribute.future(ask(PICTURES), timeout=TIMEOUT_S)
        assert gate.reached.wait(TIMEOUT_S)
        heartbeat = here.worker.heartbeat
        heartbeat._beat_s -= heartbeat.limit_s + 1  # far enough in the past
        watchdog = Watchdog(engine, on_check=lambda: None)
        watchdog.check()
        assert (here.is_responsive, there.is_responsive) == (False, True)
        assert check(server.channel) == SERVING
        assert least_busy([here, there]) is there
        there.n_rows += 10**6  # a busy device is preferred to a stuck one
        assert least_busy([here, there]) is there
        there.n_rows -= 10**6
        gate.open()
        assert not held.result().result.failures


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_device_thread_died_is_not_serving(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
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


# The heartbeat, with a clock that the test sets


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_idle_thread_is_never_stuck(clock: Clock) -> None:
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


def test_stuck_chunks_and_device_tasks_do_not_raise_the_limit(clock: Clock) -> None:
    heartbeat = Heartbeat(stuck_s=5, clock=clock)
    heartbeat.beat()
    clock.now_s += 1000
    heartbeat.beat()
    clock.now_s += 4
    heartbeat.rest(extends_limit=False)
    assert heartbeat.limit_s == 5


def test_an_engine_whose_device_is_stuck_can_be_closed(gate: Gate) -> None:
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
