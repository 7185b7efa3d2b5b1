"""The load generator: schedules, statistics, and loads on servers that stall or refuse."""

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sidelight._cli.bench.load import Load, arrivals
from sidelight._cli.bench.measurement import Bench, Plan
from sidelight._cli.bench.recorder import Fault, Recorder, Sample, Window
from sidelight._cli.bench.statistics import Figures, histogram, is_stable, percentile
from sidelight._cli.bench.traffic import Traffic, batches_of_files, random_batches

from support.models.gate import Gate, Gated

PIXELS = np.zeros((1, 32, 32, 3), np.uint8)


@pytest.fixture
def gated(gate: Gate, device: str) -> Iterator[str]:
    """The address of a server that answers while the gate is open, and takes one request at a time."""
    spec = sidelight_server.ModelSpec(Gated(gate), input_size=(3, 32, 32))
    with sidelight_server.serve(spec, device=device, max_in_flight=1) as address:
        yield address
        gate.open()


def window(latencies: Sequence[float] = (), *, seconds: float = 1.0) -> Window:
    """A window of `seconds` with one answered request for each latency."""
    window = Window()
    window.began_s, window.ended_s, window.cpu_s = 10.0, 10.0 + seconds, 0.5 * seconds
    for latency in latencies:
        window.latency.add(latency)
    return window


def figures(rate: int, latency: float) -> Figures:
    return Figures.of([window([latency] * rate)])


def test_constant_arrivals_are_exact_however_many() -> None:
    due = list(itertools.islice(arrivals("constant", 7), 10_000))
    assert due == [i / 7 for i in range(10_000)]


def test_poisson_arrivals_have_exponential_gaps_and_a_seed() -> None:
    n, rate = 40_000, 50.0
    due = np.array(list(itertools.islice(arrivals("poisson", rate, seed=1), n)))
    gaps = np.diff(due, prepend=0.0)
    assert gaps.min() > 0
    # Of an exponential the deviation is the mean; five standard errors of each.
    assert gaps.mean() == pytest.approx(1 / rate, rel=5 / math.sqrt(n))
    assert gaps.std() == pytest.approx(1 / rate, rel=5 * math.sqrt(2 / n))
    assert (gaps > 1 / rate).mean() == pytest.approx(math.exp(-1), abs=5 * 0.5 / math.sqrt(n))
    again, other = (list(itertools.islice(arrivals("poisson", rate, seed=seed), 50)) for seed in (1, 2))
    assert again == due[:50].tolist()
    assert again != other


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=200), st.sampled_from([50, 90, 95, 99]))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values: list[float], percent: int) -> None:
    found = percentile(np.array(values), percent)
    assert found in values
    assert 100 * sum(value <= found for value in values) >= percent * len(values)
    assert 100 * sum(value < found for value in values) < percent * len(values)


def test_a_sample_counts_all_and_keeps_a_fair_choice() -> None:
    sample = Sample(limit=1000)
    for value in range(10_000):
        sample.add(value)
    assert (sample.count, sample.sum, sample.max) == (10_000, 49_995_000, 9999)
    kept = sample.values
    assert len(kept) == len(set(kept)) == 1000
    assert kept.mean() == pytest.approx(4999.5, abs=5 * 2887 / math.sqrt(1000))  # five standard errors


def test_figures_of_several_windows_are_of_all_their_answers() -> None:
    first, second = window([0.1] * 9, seconds=1), window([0.2, 0.4, 0.6], seconds=3)
    first.n_images = second.n_images = 20
    first.n_rows = 400
    first.faults["Unavailable"] = Fault(2, "away")
    second.faults |= {"Unavailable": Fault(1, "gone"), "DeadlineExceeded": Fault(4, "late")}
    both = Figures.of([first, second])
    assert (both.seconds, both.requests, both.failed) == (4.0, 12, 7)
    assert (both.requests_per_s, both.images_per_s, both.rows_per_s, both.client_cpu) == (3.0, 10.0, 100.0, 0.5)
    assert both.failures == {"Unavailable": Fault(3, "away"), "DeadlineExceeded": Fault(4, "late")}
    assert both.latency.mean_s == pytest.approx(2.1 / 12)
    assert (both.latency.p50_s, both.latency.p90_s, both.latency.p99_s, both.latency.max_s) == (0.1, 0.4, 0.6, 0.6)
    assert first.faults["Unavailable"].count == 2  # what was summed is as it was


def test_a_window_without_an_answer_has_no_latency() -> None:
    empty = Figures.of([window()])
    assert (empty.requests, empty.requests_per_s, empty.latency, empty.split, empty.lateness) == (
        0,
        0,
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("windows", "stable"),
    [
        ([], False),
        ([(100, 0.1)] * 2, False),
        ([(100, 0.1)] * 3, True),
        ([(100, 0.1), (110, 0.1), (105, 0.11)], True),
        ([(100, 0.1), (111, 0.1), (105, 0.1)], False),
        ([(100, 0.1), (100, 0.111), (100, 0.1)], False),
        ([(10, 0.9), (100, 0.1), (100, 0.1), (100, 0.1)], True),
        ([(100, 0.1), (100, 0.1), (100, 0.1), (10, 0.9)], False),
        ([(0, 0.1)] * 3, False),
    ],
    ids=["none", "two", "equal", "within", "rate", "latency", "at last", "no more", "no answers"],
)
def test_three_windows_agree_in_rate_and_latency_or_not(windows: list[tuple[int, float]], stable: bool) -> None:
    assert is_stable([figures(*each) for each in windows], within=0.1 + 1e-9, percent=95) is stable


def test_every_value_lies_in_its_bin_of_the_histogram() -> None:
    values = np.random.default_rng(0).lognormal(-4, 1, 5000)
    bins = histogram(values)
    edges = np.array(bins.edges_s)
    assert sum(bins.counts) == 5000
    assert bins.counts[0]
    assert bins.counts[-1]
    np.testing.assert_allclose(edges[1:] / edges[:-1], 10 ** (1 / 50))
    np.testing.assert_array_equal(np.histogram(values, edges)[0], bins.counts)
    assert histogram(np.empty(0)).counts == ()


def test_files_go_round_in_batches_and_as_pixels_of_the_models_size(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (50, 40), (i, i, i)).save(path)
    files = batches_of_files(paths, 2)
    assert [len(each) for each in files] == [2, 2, 2]
    assert list(itertools.chain(*files)) == [path.read_bytes() for path in paths] * 2
    pixels = batches_of_files(paths, 2, size=(3, 32, 24))
    assert {(each.shape, each.dtype.name) for each in pixels} == {((2, 32, 24, 3), "uint8")}
    assert [each[:, 0, 0, 0].tolist() for each in pixels] == [[0, 1], [2, 0], [1, 2]]
    assert batches_of_files(paths, 1, size=(1, 32, 24))[0].shape == (1, 32, 24, 1)


def test_noise_is_seeded_and_of_the_models_size(client: sidelight.Client) -> None:
    model = client.model()
    first, again, other = (random_batches(5, model, seed=seed) for seed in (0, 0, 1))
    assert {(each.shape, each.dtype.name) for each in first} == {((5, 32, 32, 3), "uint8")}
    np.testing.assert_array_equal(first, again)
    assert (np.array(first) != np.array(other)).any()
    assert random_batches(5, model, shape=(2, 8, 9))[0].shape == (5, 2, 8, 9)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["unary", "stream"])
def test_a_stalled_server_is_charged_from_when_requests_were_due(gate: Gate, gated: str, is_streamed: bool) -> None:
    """The server pauses for 0.2 s. Requests due in its first half have a latency of at least 0.1 s, also late ones."""
    n, rate, stall_s = 40, 200.0, 0.2
    recorder = Recorder()
    client = sidelight.connect(gated, connect_timeout=10)
    traffic = Traffic([PIXELS], is_streamed=is_streamed, window=1 if is_streamed else None)
    gate.shut()
    with Load(client, traffic, recorder, n_callers=1, arrivals=itertools.islice(arrivals("constant", rate), n)) as load:
        assert gate.reached.wait(30)
        threading.Event().wait(stall_s)  # the stall itself
        gate.open()
        load.join(30)
    seen = recorder.cut()
    assert (seen.latency.count, seen.lateness.count, seen.faults) == (n, n, {})
    due_in_its_first_half = math.floor(rate * stall_s / 2)
    assert (seen.latency.values >= stall_s / 2).sum() >= due_in_its_first_half
    # Late sends are reported, and are part of the latency.
    assert Figures.of([seen]).split.late_s == pytest.approx(seen.lateness.sum / n)
    assert seen.n_late > 0


def test_refusals_are_counted_by_their_type(gate: Gate, gated: str) -> None:
    """The client retries until the call's timeout; in its last attempt the deadline may pass instead."""
    recorder = Recorder()
    with sidelight.connect(gated, connect_timeout=10) as busy:
        gate.shut()
        holder = threading.Thread(target=busy.attribute, args=(PIXELS,))
        holder.start()
        assert gate.reached.wait(30)
        client = sidelight.connect(gated, connect_timeout=10)
        due = itertools.islice(arrivals("poisson", 1000), 5)
        with Load(client, Traffic([PIXELS], timeout_s=0.3), recorder, n_callers=5, arrivals=due) as load:
            load.join(30)
        gate.open()
        holder.join()
    seen = recorder.cut()
    assert seen.latency.count == 0
    assert set(seen.faults) <= {"ResourceExhausted", "DeadlineExceeded"}
    assert sum(each.count for each in seen.faults.values()) == 5
    assert recorder.unanswered_s() == []


@pytest.mark.parametrize("is_streamed", [False, True], ids=["unary", "stream"])
def test_an_example_that_fails_fails_its_request(address: str, is_streamed: bool) -> None:
    recorder = Recorder()
    client = sidelight.connect(address, connect_timeout=10)
    traffic = Traffic([[b"no picture"]], is_streamed=is_streamed)
    with Load(client, traffic, recorder, n_callers=2, arrivals=iter([0.0] * 6)) as load:
        load.join(30)
    (fault,) = recorder.cut().faults.items()
    assert (fault[0], fault[1].count) == ("PartialFailure", 6)


def test_requests_in_flight_at_the_end_are_reported_with_their_age(gate: Gate, gated: str) -> None:
    recorder = Recorder()
    gate.shut()
    with Load(sidelight.connect(gated, connect_timeout=10), Traffic([PIXELS]), recorder, n_callers=1) as load:
        assert gate.reached.wait(30)
        load.run(0.01)
        (age_s,) = recorder.unanswered_s()
        assert age_s > 0.009
    gate.open()
    assert recorder.cut().faults == {}  # requests cancelled by the end of the load are not failures


def test_an_exception_in_a_caller_ends_the_load_with_it(address: str) -> None:
    client = sidelight.connect(address, connect_timeout=10)
    with Load(client, Traffic([]), Recorder(), n_callers=2) as load:  # there is nothing to send
        load.join(30)
        with pytest.raises(RuntimeError):
            load.run(30)


def test_a_load_without_requests_measures_nothing() -> None:
    bench = Bench(Plan("unix:/nowhere"), Traffic([PIXELS]))
    bench.run(lambda step, windows: None)
    assert (bench.results, bench.is_whole) == ([], True)
