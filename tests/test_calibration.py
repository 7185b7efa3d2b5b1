"""The size of a chunk: measured at load, within a time and a memory that are never exceeded to find out."""

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
import torch
from models import small_cnn
from sidelight_server import Engine, ModelSpec, Settings, calibration
from torch import Tensor, nn

SIZE = (3, 32, 32)


class Paced(nn.Module):
    """A model whose chunks take what a test says: the clock is the test's."""

    def __init__(self, seconds: dict[int, float]) -> None:
        super().__init__()
        self.inner = small_cnn()
        self.seconds = seconds
        self.now = 0.0
        self.largest = 0

    def forward(self, x: Tensor) -> Tensor:
        self.largest = max(self.largest, len(x))
        self.now += self.seconds.get(len(x), 0.0)
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
def test_a_slow_model_gets_fewer_rows_and_is_never_run_for_longer_to_find_out(
    a_row_s: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Paced({n: n * a_row_s for n in range(1, 300)})
    with calibrated(module, monkeypatch, max_chunk_s=0.5) as engine:
        assert engine.model("").chunk_rows == expected
    # A trial may be expected to take twice the time, for a row alone is slower than in company; and two rows always
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


def test_what_is_set_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with calibrated(small_cnn(), monkeypatch, max_chunk_rows=5) as engine:
        model = engine.model("")
    assert model.chunk_rows == 5
    assert model.warm_up == ()


def test_a_model_of_any_size_is_not_measured() -> None:
    with Engine([ModelSpec(small_cnn())], Settings(device="cpu")) as engine:
        asyncio.run(engine.warm_up())
        assert engine.model("").chunk_rows == calibration.DEFAULT_CHUNK_ROWS


def test_free_memory_is_what_the_machine_has_at_most() -> None:
    assert 0 < calibration.free_memory(torch.device("cpu")) < 1 << 50
