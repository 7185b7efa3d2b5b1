"""`sidelight bench` on a real server: its output, its options and its exit codes."""

import contextlib
import functools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import sidelight
import sidelight_server
from click.testing import Result
from PIL import Image
from sidelight._cli.app import app
from sidelight._cli.bench import command
from sidelight._cli.bench.measurement import Bench, Step
from sidelight._cli.bench.statistics import Figures
from typer.testing import CliRunner

from support.models import small_cnn

Run = Callable[..., Result]
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


def test_the_load_has_the_options_of_attribute(run: Run) -> None:
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


def test_a_load_that_does_not_become_steady_exits_with_code_1(run: Run) -> None:
    options = ["--interval", 0.05, "--max-windows", 4, "--stability", 1e-9, "--concurrency", 1, "--json", "out.json"]
    done = run(*options)
    assert done.exit_code == 1
    assert "1 caller *" in done.stdout
    assert "not stable: the last 3 of 4 windows do not agree" in done.stdout
    (load,) = json.loads(Path("out.json").read_text())["loads"]
    assert load["stable"] is False
    assert len(load["windows"]) == 4


def test_a_load_that_becomes_steady_ends_there_with_code_0(run: Run) -> None:
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


def test_a_load_without_an_answer_exits_with_code_1_and_the_reason(run: Run, tmp_path: Path) -> None:
    Image.new("RGB", (200, 200)).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:100])  # a picture by its head
    done = run("cut.png", "--concurrency", 2, "--duration", 0.6, "--plot", "out.png")
    assert done.exit_code == 1
    assert re.search(r"2 callers: \d+ × PartialFailure, the first: 1 of 1 examples failed; example 0: ", done.stdout)
    assert Path("out.png").exists()  # with nothing in it


def test_ctrl_c_prints_what_was_measured_so_far(
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


def test_without_matplotlib_a_plot_is_refused_before_the_load(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_invalid_address_is_a_usage_error(run: Run) -> None:
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
def test_a_wrong_option_is_reported_with_the_expected_values(run: Run, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_neither_torch_nor_matplotlib_is_loaded_for_it() -> None:
    heavy = "{'torch', 'sidelight_server', 'matplotlib'} & set(sys.modules)"
    program = f"import sys, sidelight._cli.app; sys.exit(str({heavy} or ''))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == ""
