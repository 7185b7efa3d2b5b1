"""The chunk size: measured at load, without ever exceeding the limits of time and memory."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sidelight
import sidelight_server
import torch
from sidelight_server import Engine, ModelSpec, Request, Settings
from sidelight_server.engine.registry import loader, recalibration
from sidelight_server.engine.registry.recalibration import recalibrate
from sidelight_server.models import calibration
from torch import Tensor, nn

from support.models import reloadable, small_cnn
from support.tolerances import NEIGHBORS

SIZE = (3, 32, 32)


class Paced(nn.Module):
    """A model whose chunks take the time that a test sets on its own clock."""

    def __init__(self, seconds: dict[int, float]) -> None:
        super().__init__()
        self.inner = small_cnn()
        self.seconds = seconds
        self.disturbed: dict[int, Iterator[float]] = {}  # by what the next runs take longer
        self.now = 0.0
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, len(x))
        self.now += self.seconds.get(len(x), 0.0) * next(self.disturbed.get(len(x), iter(())), 1.0)
        return self.inner(x)

    def __deepcopy__(self, memo: dict[int, object]) -> "Paced":
        return self


@contextlib.contextmanager
def calibrated(module: nn.Module, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Iterator[Engine]:
    if isinstance(module, Paced):
        monkeypatch.setattr(calibration.time, "perf_counter", lambda: module.now)
    with Engine([ModelSpec(module, input_size=SIZE)], Settings(device="cpu", **settings)) as engine:
        asyncio.run(engine.warm_up())
        yield engine


RATES = {
    "more rows are better": ({1: 1.0, 8: 4.0, 16: 4.0, 32: 4.0}, 32),
    "from 16 on it makes no difference": ({1: 1.0, 8: 4.0, 16: 4.0, 32: 7.9}, 16),
    "8 reach 95 %": ({1: 1.0, 8: 4.0, 16: 7.7, 32: 15.4}, 8),
    "more rows are worse": ({1: 1.0, 8: 4.0, 16: 16.0, 32: 64.0}, 8),
}


@pytest.mark.parametrize(("seconds", "expected"), RATES.values(), ids=RATES)
def test_a_chunk_has_the_fewest_rows_that_reach_95_percent_of_the_best_rate(
    seconds: dict[int, float], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Paced(seconds)
    with calibrated(module, monkeypatch, max_chunk_s=1000) as engine:
        model = engine.model("")
    assert model.chunk_rows == expected
    assert [trial.rows for trial in model.warm_up if trial.chosen] == [expected]
    assert {trial.rows: trial.rows / trial.rows_per_second for trial in model.warm_up} == pytest.approx(
        {trial.rows: seconds[trial.rows] for trial in model.warm_up}
    )


SLOW = {"8 rows in time": (0.05, 8), "4 rows in time": (0.1, 4), "3 rows in time": (0.15, 2), "none": (2.0, 1)}


@pytest.mark.parametrize(("a_row_s", "expected"), SLOW.values(), ids=SLOW)
def test_a_slow_model_gets_fewer_rows_and_no_longer_chunk_is_tried(
    a_row_s: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Paced({n: n * a_row_s for n in range(1, 300)})
    with calibrated(module, monkeypatch, max_chunk_s=0.5) as engine:
        assert engine.model("").chunk_rows == expected
    # A trial may be expected to take twice the time, for a row alone is slower than beside others; and two rows always
    # run, to see whether they touch.
    assert module.largest <= max(2, 1.0 / a_row_s)


def test_memory_is_reckoned_from_one_and_two_rows_and_never_run_into(monkeypatch: pytest.MonkeyPatch) -> None:
    # One row keeps its input (12 KiB), 8 maps of 32² (32 KiB) several times over, and so on: some 150 KiB.
    for limit, most in ((400_000, 4), (1_000_000, 8), (1_000, 1)):
        module = Paced(dict.fromkeys(range(1, 300), 0.001))
        with calibrated(module, monkeypatch, device_memory_limit=limit) as engine:
            model = engine.model("")
            a_row = calibration._bytes(model, 2) - calibration._bytes(model, 1)
            assert model.chunk_rows <= max(1, limit // a_row)
            assert model.chunk_rows <= most
        assert module.largest <= max(2, limit // a_row)


def test_a_set_chunk_size_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with calibrated(small_cnn(), monkeypatch, max_chunk_rows=5) as engine:
        model = engine.model("")
    assert model.chunk_rows == 5
    assert model.warm_up == ()


def test_a_model_of_any_size_is_not_measured() -> None:
    with Engine([ModelSpec(small_cnn())], Settings(device="cpu")) as engine:
        asyncio.run(engine.warm_up())
        assert engine.model("").chunk_rows == calibration.DEFAULT_CHUNK_ROWS


# Beside other processes

LOADED = {n: 0.6 * n for n in range(1, 33)}  # a single row takes more than max_chunk_s
QUIET = {n: 0.1 + 0.02 * n for n in range(1, 33)}  # 16 rows take 0.42 s, 32 take 0.74 s
HALF_LOADED = {n: 2 * seconds for n, seconds in QUIET.items()}  # 8 rows take 0.52 s, 4 take 0.36 s


def test_runs_that_were_disturbed_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Paced({1: 0.01, 8: 0.04, 16: 0.04, 32: 0.04})
    module.disturbed = {32: itertools.chain([9.0, 9.0, 7.0, 8.0], itertools.repeat(1.0))}
    with calibrated(module, monkeypatch, max_chunk_s=1000) as engine:
        assert engine.model("").chunk_rows == 32


def test_runs_that_never_agree_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Paced({1: 0.01, 8: 0.04, 16: 0.04, 32: 0.04})
    module.disturbed = {8: (2.0**n for n in itertools.count())}
    with calibrated(module, monkeypatch, max_chunk_s=1000) as engine:
        assert engine.model("").chunk_rows == 32


def measure_again(engine: Engine, module: Paced, seconds: dict[int, float]) -> int:
    module.seconds = seconds
    asyncio.run(engine.registry.measure_again())
    return engine.model("").chunk_rows


def test_a_size_that_was_measured_under_load_grows_and_never_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Paced(LOADED)
    with calibrated(module, monkeypatch) as engine:
        model = engine.model("")
        assert model.chunk_rows == 1
        assert measure_again(engine, module, HALF_LOADED) == 4
        assert measure_again(engine, module, LOADED) == 4
        assert measure_again(engine, module, QUIET) == 16
        assert measure_again(engine, module, LOADED) == 16
        assert [trial.rows for trial in model.warm_up if trial.chosen] == [16]
        fastest = {trial.rows: trial.rows / trial.rows_per_second for trial in model.warm_up}
    # 2 and 4 were not measured again: what they gave under load is the best that is known of them.
    for rows, seconds in fastest.items():
        assert seconds == pytest.approx((HALF_LOADED if rows in (2, 4) else QUIET)[rows])


def test_a_measurement_runs_nothing_while_requests_come(monkeypatch: pytest.MonkeyPatch, floats: Tensor) -> None:
    """A run of 16 rows would delay them. Calls in sequence leave the device without requests for moments."""
    module = Paced(LOADED)
    monkeypatch.setattr(loader, "MAX_IDLE_WAIT_S", 1.5)
    with calibrated(module, monkeypatch) as engine:
        module.seconds = QUIET

        async def run() -> None:
            measuring = asyncio.create_task(engine.registry.measure_again())
            while not measuring.done():
                await engine.attribute(Request(floats[:1].numpy()))
            await measuring

        module.largest = 0
        asyncio.run(run())
        assert module.largest == 1
        assert engine.model("").chunk_rows == 1
        assert measure_again(engine, module, QUIET) == 16


def test_another_version_may_grow_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reloadable.write_weights(tmp_path / "net.safetensors", seed=1)
    settings = Settings(device="cpu", model=reloadable.SOURCE, weights=tmp_path / "net.safetensors")
    with Engine(list(settings.of_models().values()), settings) as engine:
        asyncio.run(engine.warm_up())
        asyncio.run(engine.registry.reload(""))
        assert engine.model("").version == 2
        assert engine.model("").is_measured


UNMEASURED = {
    "set": {"max_chunk_rows": 2},
    "reproducible": {"reproducible": True},
    "several rows, reproducible": {"reproducible": True, "reproducible_rows": 2},
}


@pytest.mark.parametrize("settings", UNMEASURED.values(), ids=UNMEASURED)
def test_only_what_was_measured_is_measured_again(settings: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    module = Paced(dict.fromkeys(range(1, 300), 0.001))
    with calibrated(module, monkeypatch, **settings) as engine:
        before, ran_s = engine.model("").chunk_rows, module.now
        assert measure_again(engine, module, QUIET) == before
        assert module.now == ran_s


def test_a_measurement_that_fails_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = Paced(LOADED)
    with calibrated(module, monkeypatch) as engine:
        module.disturbed = {1: iter([1.0, "no number"])}
        assert measure_again(engine, module, QUIET) == 1
        assert "event=measuring_failed" in caplog.text
        module.disturbed = {}
        assert measure_again(engine, module, QUIET) == 16


class Enough(Exception):
    """Ends a test's measurement."""


class Registry:
    """Counts the measurements of chunks."""

    def __init__(self) -> None:
        self.n_measured = 0

    async def measure_again(self) -> None:
        self.n_measured += 1


class Device:
    """A device that is busy the first `n_busy` times that it is asked, and then idle."""

    def __init__(self, *, n_busy: int) -> None:
        self._n_busy = n_busy

    @property
    def is_idle(self) -> bool:
        self._n_busy -= 1
        return self._n_busy < 0


def waits(*, n_busy: int, until: int) -> list[float]:
    """Return all waits before the measurement number `until`."""
    registry, slept = Registry(), []

    async def sleep(seconds: float) -> None:
        if registry.n_measured == until:
            raise Enough
        slept.append(seconds)

    with pytest.raises(Enough):
        asyncio.run(recalibrate(registry, [Device(n_busy=n_busy)], sleep=sleep))
    return slept


def test_each_measurement_comes_after_twice_the_time() -> None:
    assert waits(n_busy=0, until=4) == [60, 120, 240, 480]


def test_a_measurement_waits_until_no_request_has_been_active_for_a_while() -> None:
    assert waits(n_busy=3, until=2) == [60, 1, 1, 1, 120]
    assert waits(n_busy=500, until=1) == [60] + [1] * 500


def test_a_server_measures_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Paced(LOADED)
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: module.now)
    monkeypatch.setattr(recalibration, "FIRST_S", 0.01)
    with (
        sidelight_server.serve(ModelSpec(module, input_size=SIZE), device="cpu", threads=1) as address,
        sidelight.connect(address) as client,
    ):
        module.seconds = QUIET
        until_s = time.monotonic() + 30
        while client.info().models[0].chunk_rows < 16:
            assert time.monotonic() < until_s


def test_free_memory_is_what_the_machine_has_at_most() -> None:
    assert 0 < calibration.free_memory(torch.device("cpu")) < 1 << 50


# What neighbors do to a map.


class SteeperInCompany(nn.Module):
    """Its outputs do not depend on neighbors. Its gradient is larger by a thousandth where there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_cnn()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + 1e-3 * (x - x.detach()) if len(x) > 1 else x)


def test_what_neighbors_do_to_a_map_is_measured_and_reported(device: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = ModelSpec(SteeperInCompany(), input_size=(3, 32, 32), name="steeper")
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        assert client.model().neighbor_difference == pytest.approx(1e-3, rel=0.05)
    assert 'event=neighbors_differ model="steeper"' in caplog.text


def test_rounding_alone_is_no_warning(spec: ModelSpec, device: str, caplog: pytest.LogCaptureFixture) -> None:
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        assert client.model().neighbor_difference < NEIGHBORS
    assert "neighbors_differ" not in caplog.text


def test_a_reproducible_model_has_no_neighbors(device: str) -> None:
    spec = ModelSpec(SteeperInCompany(), input_size=(3, 32, 32))
    with (
        sidelight_server.serve(spec, device=device, reproducible=True) as address,
        sidelight.connect(address) as client,
    ):
        assert client.model().neighbor_difference == 0


def test_without_an_input_size_it_is_not_measured(device: str) -> None:
    with sidelight_server.serve(small_cnn(), device=device) as address, sidelight.connect(address) as client:
        assert client.model().neighbor_difference is None


def test_a_server_in_ones_own_process_takes_as_many_threads_as_torch(floats: torch.Tensor) -> None:
    for threads in (1, 3):
        torch.set_num_threads(threads)  # the fixture of all tests puts it back
        with sidelight_server.serve(small_cnn(), device="cpu") as address, sidelight.connect(address) as client:
            assert client.attribute(floats).provenance.threads == threads
