"""The load generator: schedules, statistics, and the output of `sidelight bench` for a real server."""

import contextlib
import functools
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sidelight._cli.app import app
from sidelight._cli.bench import command
from sidelight._cli.bench.arrivals import arrivals
from sidelight._cli.bench.load import Load
from sidelight._cli.bench.measurement import Bench, Plan, Step
from sidelight._cli.bench.recorder import Fault, Recorder, Window
from sidelight._cli.bench.sample import Sample, percentile
from sidelight._cli.bench.statistics import Figures, histogram, is_stable
from sidelight._cli.bench.traffic import Traffic, batches_of_files, random_batches
from typer.testing import CliRunner

from support.models import small_cnn
from support.models.gate import Gate, Gated

Run = Callable[..., Result]
PIXELS = np.zeros((1, 32, 32, 3), np.uint8)
# Three windows, or as many more as a busy machine takes until it has answered in three.
SHORT = ["--interval", 0.1, "--max-windows", 100, "--stability", 1e9]


@pytest.fixture
def run(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs `sidelight bench` in an empty folder, on the server under test."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, **variables: str) -> Result:
        variables = {"SIDELIGHT_ADDRESS": address, "COLUMNS": "120", "NO_COLOR": "1"} | variables
        return CliRunner().invoke(app, ["bench", *map(str, arguments)], env=variables, prog_name="sidelight")

    return run


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


def test_what_is_on_its_way_at_the_end_is_reported_with_its_age(gate: Gate, gated: str) -> None:
    recorder = Recorder()
    gate.shut()
    with Load(sidelight.connect(gated, connect_timeout=10), Traffic([PIXELS]), recorder, n_callers=1) as load:
        assert gate.reached.wait(30)
        load.run(0.01)
        (age_s,) = recorder.unanswered_s()
        assert age_s > 0.009
    gate.open()
    assert recorder.cut().faults == {}  # ending the load is nobody's failure


def test_a_mistake_in_a_caller_ends_the_load_with_it(address: str) -> None:
    client = sidelight.connect(address, connect_timeout=10)
    with Load(client, Traffic([]), Recorder(), n_callers=2) as load:  # there is nothing to send
        load.join(30)
        with pytest.raises(RuntimeError):
            load.run(30)


@pytest.mark.parametrize(
    "loop", [["--concurrency", "1,3"], ["--rate", "40", "--arrivals", "poisson"]], ids=lambda x: x[0]
)
@pytest.mark.parametrize("mode", ["unary", "stream"])
def test_the_json_holds_every_load_and_adds_up(run: Run, client: sidelight.Client, mode: str, loop: list[str]) -> None:
    batch, method = 3, "smoothgrad(samples=4)"
    options = ["--mode", mode, *loop, "--batch", batch, "--method", method, *SHORT, "--json", "out.json"]
    done = run(*options, "--target", 3)
    assert done.exit_code == 0, done.output
    facts = json.loads(Path("out.json").read_text())
    assert facts["server_version"] == client.info().version
    assert facts["provenance"]["model_digest"] == client.info().models[0].digest
    assert facts["provenance"]["target"] == "index 3"
    assert facts["settings"]["images"] == "uint8 32 × 32 × 3"
    assert facts["settings"]["mode"] == mode
    is_open = loop[0] == "--rate"
    assert [(each["step"]["callers"], each["step"]["rate"]) for each in facts["loads"]] == (
        [(None, 40.0)] if is_open else [(1, None), (3, None)]
    )
    for load in facts["loads"]:
        figures, latency = load["figures"], load["figures"]["latency"]
        assert len(load["windows"]) >= 3
        assert figures["requests"] == sum(each["requests"] for each in load["windows"][-3:]) > 0
        assert figures["failed"] == 0
        assert figures["seconds"] == pytest.approx(sum(each["seconds"] for each in load["windows"][-3:]))
        assert figures["requests_per_s"] * figures["seconds"] == pytest.approx(figures["requests"])
        assert figures["images_per_s"] == pytest.approx(batch * figures["requests_per_s"])
        assert figures["rows_per_s"] == pytest.approx(5 * figures["images_per_s"])  # the example itself, and 4
        assert sum(figures["split"].values()) == pytest.approx(latency["mean_s"])
        assert min(figures["split"].values()) >= -1e-6
        ranks = [latency[f"{name}_s"] for name in ("p50", "p90", "p95", "p99", "max")]
        assert ranks == sorted(ranks)
        assert sum(load["histogram"]["counts"]) == figures["requests"]
        assert (figures["lateness"] is not None) is is_open
    names = re.findall(r"(?m)^(\d[\w/]* \w+)(?: \*)?  ", done.stdout)
    assert sorted(set(names)) == (
        ["40/s poisson"]
        if is_open
        else sorted({"1 caller", "3 callers"} if mode == "unary" else {"1 stream", "3 streams"})
    )


def test_what_is_explained_has_the_options_of_attribute(run: Run) -> None:
    explained = ["--top-k", 2, "--method", "smoothgrad", "--option", "samples=2", "--channels", "sum"]
    done = run(*explained, "--concurrency", 1, *SHORT, "--json", "out.json")
    assert done.exit_code == 0, done.output
    provenance = json.loads(Path("out.json").read_text())["provenance"]
    assert (provenance["target"], provenance["channels"]) == ("top 2", "sum")
    assert provenance["method"].startswith("smoothgrad(samples=2")


def test_pictures_are_sent_as_files_or_as_pixels(run: Run) -> None:
    Image.new("RGB", (50, 40)).save("a.png")
    for options, images in (
        ([], "files"),
        (["--pixels"], "uint8 32 × 32 × 3"),
    ):
        done = run("a.png", *options, "--concurrency", 2, *SHORT, "--json", "out.json")
        assert done.exit_code == 0, done.output
        assert json.loads(Path("out.json").read_text())["settings"]["images"] == images
        assert images in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="memory is shared on Linux alone")
def test_arrays_go_through_shared_memory_if_asked_to(device: str, run: Run, tmp_path: Path) -> None:
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32))
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o700)
    options = ["--mode", "stream", "--concurrency", 1, *SHORT, "--json", "out.json", "--shared-memory"]
    with sidelight_server.serve(spec, device=device, shared_memory=folder) as address:
        done = run(*options, "--address", address)
    assert done.exit_code == 0, done.output
    assert json.loads(Path("out.json").read_text())["transport"] == "shared_memory"


def test_a_model_without_an_input_size_needs_a_shape(device: str, run: Run) -> None:
    with sidelight_server.serve(small_cnn(), device=device) as address:
        refused = run("--address", address)
        done = run("--address", address, "--shape", "3,32,32", "--concurrency", 1, *SHORT)
    assert refused.exit_code == 1
    assert refused.stderr.count("\n") == 1
    assert "expected --shape C,H,W" in refused.stderr
    assert done.exit_code == 0, done.output
    assert "float32 3 × 32 × 32" in done.stdout


def test_a_load_that_does_not_come_to_rest_ends_with_one(run: Run) -> None:
    options = ["--interval", 0.05, "--max-windows", 4, "--stability", 1e-9, "--concurrency", 1, "--json", "out.json"]
    done = run(*options)
    assert done.exit_code == 1
    assert "1 caller *" in done.stdout
    assert "not stable: the last 3 of 4 windows do not agree" in done.stdout
    (load,) = json.loads(Path("out.json").read_text())["loads"]
    assert load["stable"] is False
    assert len(load["windows"]) == 4


def test_a_load_that_comes_to_rest_ends_there_with_zero(run: Run) -> None:
    done = run(*SHORT, "--concurrency", 1, "--json", "out.json")
    assert done.exit_code == 0, done.output
    assert "not stable" not in done.stdout
    (load,) = json.loads(Path("out.json").read_text())["loads"]
    assert load["stable"] is True
    assert 3 <= len(load["windows"]) < 100


def test_a_duration_is_measured_whole_in_three_windows(run: Run) -> None:
    done = run("--duration", 1, "--stability", 1e-9, "--concurrency", 1, "--json", "out.json")
    assert done.exit_code == 0, done.output
    (load,) = json.loads(Path("out.json").read_text())["loads"]
    assert len(load["windows"]) == 3
    assert load["figures"]["seconds"] > 0.99


def test_a_load_without_an_answer_ends_with_one_and_says_why(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (200, 200)).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:100])  # a picture by its head
    done = run("cut.png", "--concurrency", 2, "--duration", 0.6, "--plot", "out.png")
    assert done.exit_code == 1
    assert re.search(r"2 callers: \d+ × PartialFailure, the first: 1 of 1 examples failed; example 0: ", done.stdout)
    assert Path("out.png").exists()  # with nothing in it


def test_ctrl_c_ends_with_what_was_measured_so_far(
    run: Run, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    @contextlib.contextmanager
    def interrupting(console: object, bench: Bench) -> Iterator[Callable[[Step, Sequence[Figures]], None]]:
        def watch(step: Step, windows: Sequence[Figures]) -> None:
            if step.callers == 2 and len(windows) == 2:
                signal.raise_signal(signal.SIGINT)

        yield watch

    monkeypatch.setattr(command, "progress", interrupting)
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    done = run("--concurrency", "1,2,3", "--interval", 0.05, "--max-windows", 3, "--json", "out.json")
    assert done.exit_code == 130, done.output
    assert "interrupted" in done.stdout
    facts = json.loads(Path("out.json").read_text())
    assert facts["interrupted"] is True
    assert [each["step"]["callers"] for each in facts["loads"]] == [1, 2]
    assert len(facts["loads"][1]["windows"]) == 3  # two, and what there was of the third


@pytest.mark.parametrize("loads", ["1", "1,2"])
def test_a_picture_is_drawn_of_one_load_or_of_several(run: Run, loads: str) -> None:
    done = run("--concurrency", loads, *SHORT, "--plot", "out.png")
    assert done.exit_code == 0, done.output
    with Image.open("out.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_a_picture_needs_matplotlib_and_says_so_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run("--plot", "out.png")
    assert done.exit_code == 1
    assert done.stderr == "sidelight: --plot: needs matplotlib: pip install 'sidelight[plot]'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--address", "unix:/nonexistent/socket", "--connect-timeout", "0.1"], "no server answers at unix:/nonexis"),
        (["missing.png"], "No such file or directory: 'missing.png'"),
        (["bad.png"], "cannot identify image file 'bad.png'"),
        (["--target", "elc"], 'did you mean "elk"?'),
        (["--model", "smal"], 'did you mean "small"?'),
        (["--timeout", "0"], "timeout: got 0.0 s, expected a positive time"),
        (["--plot", "out.gif3"], "--plot: got out.gif3, expected a name that ends in one of"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_mistake_is_reported_in_one_line_before_anything_is_measured(
    run: Run, arguments: list[str], message: str
) -> None:
    Path("bad.png").write_bytes(b"no picture")
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_address_that_is_none_is_a_usage_error(run: Run) -> None:
    done = run("--address", "nowhere")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "address: got 'nowhere'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--concurrency", "1,x"],
            "--concurrency: expected positive whole numbers separated by commas, got '1,x'",
        ),
        (["--concurrency", "0"], "--concurrency: expected positive whole numbers"),
        (["--concurrency", ""], "--concurrency: expected positive whole numbers"),
        (["--rate", "0"], "--rate: expected positive numbers separated by commas, got '0'"),
        (["--rate", "-5"], "--rate: expected positive numbers"),
        (["--rate", "nan"], "--rate: expected positive numbers"),
        (["--rate", "5", "--concurrency", "1"], "--concurrency: expected only without --rate"),
        (["--arrivals", "poisson"], "--arrivals: expected only with --rate"),
        (["--outstanding", "5"], "--outstanding: expected only with --rate"),
        (["--window", "5"], "--window: expected only with --mode stream"),
        (["--shape", "3,4"], "--shape: expected C,H,W, got '3,4'"),
        (["a.png", "--shape", "3,4,5"], "--shape: expected only without pictures"),
        (["--pixels"], "--pixels: expected only with pictures"),
        (["--interval", "0"], "--interval: expected a positive number, got 0.0"),
        (["--stable-percentile", "42"], "--stable-percentile: expected one of (50, 90, 95, 99), got 42"),
        (["--method", "smothgrad"], "did you mean 'smoothgrad'?"),
        (["--json", "no/where.json"], "--json: expected a file in an existing folder"),
        (["--batch", "0"], "--batch"),
        (["--mode", "both"], "--mode"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_wrong_option_is_named_with_what_was_expected(run: Run, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_neither_torch_nor_matplotlib_is_loaded_for_it() -> None:
    heavy = "{'torch', 'sidelight_server', 'matplotlib'} & set(sys.modules)"
    program = f"import sys, sidelight._cli.app; sys.exit(str({heavy} or ''))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""


def test_a_plan_of_nothing_measures_nothing() -> None:
    bench = Bench(Plan("unix:/nowhere"), Traffic([PIXELS]))
    bench.run(lambda step, windows: None)
    assert (bench.results, bench.is_whole) == ([], True)
