"""The row rate of a device: laws that need no device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidelight_server.engine.devices.row_rate import HALF_LIFE_S, RowRate


def busy(
    rate: RowRate, *, n_rows: int, took_s: float, n_chunks: int, pause_s: float = 0.0, from_s: float = 0.0
) -> float:
    """Add chunks one after the other. Returns when the last one ended."""
    for _ in range(n_chunks):
        rate.add(n_rows, began_s=from_s, ended_s=from_s + took_s)
        from_s += took_s + pause_s
    return from_s


@given(st.integers(1, 64), st.floats(1e-3, 10.0), st.floats(0.0, 100.0))
def test_equal_chunks_give_their_own_rate_however_long_the_device_is_idle(
    n: int, took_s: float, pause_s: float
) -> None:
    rate = RowRate()
    busy(rate, n_rows=n, took_s=took_s, n_chunks=20, pause_s=pause_s)
    assert rate.per_second == pytest.approx(n / took_s, rel=1e-6)
    assert rate.seconds(3 * n) == pytest.approx(3 * took_s, rel=1e-6)


def test_chunks_that_overlap_count_their_time_once() -> None:
    rate = RowRate()
    for i in range(10):  # each begins while the one before it runs
        rate.add(8, began_s=max(0.0, i - 1.0), ended_s=i + 1.0)
    assert rate.per_second == pytest.approx(8.0)


def test_half_of_the_past_is_forgotten_after_a_half_life_of_computing() -> None:
    rate = RowRate()
    ended_s = busy(rate, n_rows=100, took_s=1.0, n_chunks=1000)
    busy(rate, n_rows=0, took_s=1.0, n_chunks=int(HALF_LIFE_S), from_s=ended_s)
    assert rate.per_second == pytest.approx(50.0, rel=0.05)  # chunks decay in steps of a second


def test_nothing_is_estimated_before_the_first_chunk() -> None:
    assert RowRate().seconds(1000) == 0.0
