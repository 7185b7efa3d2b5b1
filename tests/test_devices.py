"""Several devices: each has a thread and replicas of its own, and a request goes where the fewest rows wait."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from engines import ask
from gate import Gate, Gated
from models import small_cnn
from sidelight_server import Answer, ConfigurationError, Engine, IntegratedGradients, ModelSpec, Request, Settings
from sidelight_server.device import choose_devices
from sidelight_server.errors import Unavailable
from sidelight_server.stops import StopTimes

TWO = Settings(device="cpu,cpu", threads=1)
PICTURE = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.fixture
def gated(gate: Gate) -> Iterator[Engine]:
    with Engine([ModelSpec(Gated(gate), input_size=(3, 32, 32))], TWO) as engine:
        yield engine


async def until(reached: Callable[[], bool]) -> None:
    """Let everything else go on until a condition holds that no event tells of."""
    while not reached():  # noqa: ASYNC110
        await asyncio.sleep(0.0005)


def asked(engine: Engine) -> tuple[threading.Thread, list[Answer]]:
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.append(asyncio.run(engine.attribute(Request(PICTURE)))))
    thread.start()
    return thread, answers


def test_two_devices_run_at_once(gated: Engine, gate: Gate) -> None:
    gate.shut()
    first = asked(gated)
    assert gate.reached.wait(30)
    gate.reached.clear()
    second = asked(gated)
    assert gate.reached.wait(30)  # while the first still stands there
    gate.open()
    for thread, answers in (first, second):
        thread.join(30)
        assert len(answers) == 1
        assert not answers[0].failures
    assert [station.n_rows for station in gated._stations] == [0, 0]


def test_a_request_goes_where_the_fewest_rows_wait(gated: Engine, gate: Gate) -> None:
    here, there = gated._stations

    async def scenario() -> None:
        gate.shut()
        long = asyncio.create_task(gated.attribute(Request(PICTURE, method=IntegratedGradients(steps=100))))
        await until(lambda: here.n_rows > 100)
        short = []
        for n_rows in (1, 2, 3):
            short.append(asyncio.create_task(gated.attribute(Request(PICTURE))))
            await until(lambda n_rows=n_rows: there.n_rows == n_rows)
        gate.open()
        await asyncio.gather(long, *short)

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert (here.n_rows, there.n_rows) == (0, 0)


def test_a_device_whose_thread_has_ended_gets_nothing_more(gated: Engine) -> None:
    gated._stations[0].runner.close()
    assert not asyncio.run(gated.attribute(Request(PICTURE))).failures
    gated._stations[1].runner.close()
    with pytest.raises(Unavailable):
        asyncio.run(gated.attribute(Request(PICTURE)))


def test_maps_are_those_of_one_device() -> None:
    spec = ModelSpec(small_cnn(), input_size=(3, 32, 32))
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with Engine([spec], Settings(device="cpu", threads=1)) as one, Engine([spec], TWO) as two:
        expected = ask(one, x)
        for _ in two._stations:
            assert np.array_equal(ask(two, x).maps, expected.maps)


def test_the_server_says_which_devices_it_has(spec: ModelSpec) -> None:
    with (
        sidelight_server.serve(spec, device="cpu,cpu", threads=1) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        assert client.model().device == "cpu,cpu"
        assert client.attribute(PICTURE).provenance.device == "cpu"


def test_every_device_is_measured_when_the_server_starts() -> None:
    with Engine([ModelSpec(small_cnn(), input_size=(3, 32, 32))], TWO) as engine:
        asyncio.run(engine.warm_up())
        assert [bool(model.warm_up) for model in engine.registry.serving("")] == [True, True]


@pytest.mark.parametrize("wanted", ["cpu,tpu", "cpu,", ""])
def test_a_device_that_is_none_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigurationError, match="device: got"):
        choose_devices(wanted)


def test_stops_of_all_devices_are_told_together() -> None:
    assert StopTimes(2, 0.3, 0.2) + StopTimes(1, 0.5, 0.5) == StopTimes(3, 0.8, 0.5)
