"""Several devices: each has a thread and replicas of its own, and a request goes where the fewest rows wait."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sidelight_server import (
    RISE,
    Answer,
    ConfigurationError,
    Engine,
    ExpectedGradients,
    GradCAM,
    Gradient,
    GuidedBackpropagation,
    IntegratedGradients,
    LayerGradientXActivation,
    ModelSpec,
    Occlusion,
    Request,
    Settings,
    SmoothGrad,
    TopK,
)  # fmt: skip
from sidelight_server.compute.torch_device import choose_devices
from sidelight_server.errors import Unavailable
from sidelight_server.methods.integrated_gradients import Rule
from sidelight_server.methods.method import Method
from sidelight_server.telemetry.call_record import CallRecord
from sidelight_server.telemetry.counters import CancellationTimes
from torch import nn

from support.engines import ask
from support.messages.attribution import ask as asking
from support.models import small_cnn
from support.models.gate import Gate, Gated
from support.servers.running import TIMEOUT_S, serving

TWO = Settings(device="cpu,cpu", threads=1)
INTERNAL = 13
PICTURE = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.fixture
def gated(gate: Gate) -> Iterator[Engine]:
    with Engine([ModelSpec(Gated(gate), input_size=(3, 32, 32))], TWO) as engine:
        yield engine


async def until(reached: Callable[[], bool]) -> None:
    """Let other tasks run until a condition holds that has no event."""
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
    assert [engine_device.n_rows for engine_device in gated._devices] == [0, 0]


def test_a_request_goes_where_the_fewest_rows_wait(gated: Engine, gate: Gate) -> None:
    here, there = gated._devices

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


def test_each_class_of_a_top_k_counts(gated: Engine, gate: Gate) -> None:
    here, there = gated.devices
    twelve = np.concatenate([PICTURE] * 12)

    async def scenario() -> None:
        gate.shut()
        many = asyncio.create_task(gated.attribute(Request(PICTURE, method=SmoothGrad(samples=10), target=TopK(9))))
        await until(lambda: here.n_rows > 0)
        twelve_rows = asyncio.create_task(gated.attribute(Request(twelve)))
        await until(lambda: there.n_rows == 12)
        # Fewer rows wait there than beside the nine classes' ninety.
        one_more = asyncio.create_task(gated.attribute(Request(PICTURE)))
        await until(lambda: there.n_rows == 13)
        gate.open()
        await asyncio.gather(many, twelve_rows, one_more)

    asyncio.run(asyncio.wait_for(scenario(), 30))


TO_TOLERANCE = IntegratedGradients(rule=Rule.TRAPEZOID, steps=0, tolerance=0.01)
METHODS = [
    Gradient(), SmoothGrad(samples=3), IntegratedGradients(steps=4), TO_TOLERANCE,
    ExpectedGradients(samples=3), GradCAM(), GuidedBackpropagation(), LayerGradientXActivation(), Occlusion(),
    RISE(masks=5),
]  # fmt: skip


@pytest.mark.parametrize("target", [None, TopK(3)], ids=["predicted", "top 3"])
@pytest.mark.parametrize("method", METHODS, ids=lambda each: each.name)
def test_no_request_takes_more_rows_than_are_counted_for_it(method: Method, target: TopK | None, gate: Gate) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with Engine([ModelSpec(Gated(gate), input_size=(3, 32, 32))], Settings(device="cpu", threads=1)) as engine:
        (engine_device,) = engine.devices
        call_record = CallRecord("Attribute", time.monotonic())

        async def scenario() -> int:
            gate.shut()
            request = Request(pictures, **{"method": method} | ({"target": target} if target else {}))
            asked = asyncio.create_task(engine.attribute(request, call_record=call_record))
            await until(lambda: engine_device.n_rows > 0)
            counted = engine_device.n_rows
            gate.open()
            assert not (await asked).failures
            return counted

        counted = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert 0 < call_record.rows <= counted
    if getattr(method, "tolerance", None) is None:
        assert counted <= 2 * call_record.rows


def test_a_device_whose_thread_has_ended_gets_no_more_requests(gated: Engine) -> None:
    gated._devices[0].worker.close()
    assert not asyncio.run(gated.attribute(Request(PICTURE))).failures
    gated._devices[1].worker.close()
    with pytest.raises(Unavailable):
        asyncio.run(gated.attribute(Request(PICTURE)))


def test_maps_are_those_of_one_device() -> None:
    spec = ModelSpec(small_cnn(), input_size=(3, 32, 32))
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with Engine([spec], Settings(device="cpu", threads=1)) as one, Engine([spec], TWO) as two:
        expected = ask(one, x)
        for _ in two._devices:
            assert np.array_equal(ask(two, x).maps, expected.maps)


def test_the_server_reports_its_devices(spec: ModelSpec) -> None:
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
def test_an_unknown_device_is_refused(wanted: str) -> None:
    with pytest.raises(ConfigurationError, match="device: got"):
        choose_devices(wanted)


def test_stops_of_all_devices_are_reported_together() -> None:
    assert CancellationTimes(2, 0.3, 0.2) + CancellationTimes(1, 0.5, 0.5) == CancellationTimes(3, 0.8, 0.5)


# A device that is lost: after some errors CUDA refuses everything, for as long as the process lives.

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"
ERRORS = [torch.AcceleratorError, RuntimeError]


class Breaking(nn.Module):
    """A model that raises CUDA's error on the devices that a test names."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.inner = small_cnn()
        self.error = error
        self.broken: set[threading.Thread] = set()
        self.armed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.armed:
            self.broken.add(threading.current_thread())
        self.check()
        return self.inner(x)

    def check(self, device: torch.device | None = None) -> None:
        if threading.current_thread() in self.broken:
            raise self.error(ILLEGAL)

    def __deepcopy__(self, memo: dict[int, object]) -> "Breaking":
        return self


@pytest.fixture(params=ERRORS, ids=lambda each: each.__name__)
def breaking(request: pytest.FixtureRequest) -> Breaking:
    return Breaking(request.param)


def breakable(breaking: Breaking, **settings: object) -> Engine:
    engine = Engine([ModelSpec(breaking, input_size=(3, 32, 32))], TWO.model_copy(update=settings))
    for engine_device in engine.devices:
        engine_device.worker.errors.check = breaking.check
    return engine


def test_a_lost_device_is_reported_once_and_others_answer(breaking: Breaking, caplog: pytest.LogCaptureFixture) -> None:
    engine = breakable(breaking)
    changed = threading.Event()
    engine.on_change = changed.set
    with engine, caplog.at_level(logging.INFO, "sidelight"):
        breaking.armed = True
        with pytest.raises(Unavailable, match="cpu has failed"):
            asyncio.run(engine.attribute(Request(np.concatenate([PICTURE] * 5))))
        assert changed.wait(30)
        breaking.armed = False
        assert [engine_device.is_responsive for engine_device in engine.devices] == [False, True]
        for _ in range(3):
            assert not asyncio.run(engine.attribute(Request(PICTURE))).failures
        with pytest.raises(Unavailable, match="cpu has failed"):
            engine.devices[0].worker.call(lambda: None)
    (critical,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert critical.levelno == logging.CRITICAL
    message = critical.getMessage()
    assert message.startswith("event=device_lost")
    assert "illegal memory access" in message
    assert "reported later" not in message
    assert not engine.devices[0].worker.heartbeat.at_work_s  # the watchdog has nothing to add


def test_what_waits_at_a_lost_device_is_unavailable(breaking: Breaking) -> None:
    with breakable(breaking, device="cpu") as engine:

        async def scenario() -> list[BaseException | Answer]:
            held, release = threading.Event(), threading.Event()
            holding = engine.devices[0].worker.call(lambda: (held.set(), release.wait(30)))
            await asyncio.to_thread(held.wait, 30)
            asked = [asyncio.create_task(engine.attribute(Request(PICTURE))) for _ in range(20)]
            await until(lambda: engine.n_unanswered == 20)
            breaking.armed = True
            release.set()
            answers = await asyncio.gather(*asked, return_exceptions=True)
            holding.result(30)
            return answers

        assert [type(each) for each in asyncio.run(scenario())] == [Unavailable] * 20


def test_a_server_whose_only_device_is_lost_is_not_serving(breaking: Breaking, tmp_path: Path) -> None:
    with serving(breakable(breaking, device="cpu"), f"unix:{tmp_path}/socket") as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(service="model/model"), timeout=TIMEOUT_S)
        assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
        breaking.armed = True
        for _ in range(2):
            with pytest.raises(grpc.RpcError, match="cpu has failed") as caught:
                server.stub.Attribute(asking(PICTURE), timeout=TIMEOUT_S)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert next(watching).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watching.cancel()


def test_a_device_that_is_found_lost_while_a_model_is_loaded_takes_no_request(breaking: Breaking) -> None:
    with breakable(breaking) as engine:
        here = engine.devices[0]
        ended = threading.Event()
        engine.on_change = ended.set
        with pytest.raises(breaking.error):
            here.in_turn(lambda: breaking.broken.add(threading.current_thread()) or breaking.check())
        assert ended.wait(30)
        assert not here.is_responsive
        assert not asyncio.run(engine.attribute(Request(PICTURE))).failures


def test_a_device_that_works_after_an_error_is_kept(breaking: Breaking) -> None:
    n_checks = 0

    def check(device: torch.device) -> None:
        nonlocal n_checks
        n_checks += 1
        if n_checks == 1:  # CUDA reports some errors twice
            raise breaking.error(ILLEGAL)

    engine = breakable(breaking, device="cpu")
    with engine:
        engine.devices[0].worker.errors.check = check
        breaking.armed = True
        assert [each.code for each in asyncio.run(engine.attribute(Request(PICTURE))).failures] == [INTERNAL]
        breaking.armed = False
        breaking.broken.clear()
        assert not asyncio.run(engine.attribute(Request(PICTURE))).failures
    assert n_checks == 2
