"""The command `sidelight`: output, files and exit codes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from click.testing import Result
from PIL import Image
from sidelight._cli.app import app
from sidelight._cli.tables import overlay_names
from sidelight.methods.parsing import METHODS
from torch import nn
from typer.testing import CliRunner

from support.models import small_cnn

Run = Callable[..., Result]
ABSENT = "unix:/nonexistent/socket"


@pytest.fixture
def run(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the command in an empty folder, on the server under test and a wide terminal."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, **variables: str) -> Result:
        variables = {"SIDELIGHT_ADDRESS": address, "COLUMNS": "200", "NO_COLOR": "1"} | variables
        return CliRunner().invoke(app, [str(each) for each in arguments], env=variables, prog_name="sidelight")

    return run


def picture(path: Path | str, *, seed: int = 0) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return path


def process(
    *arguments: object, cwd: Path, code: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    command = ["-m", "sidelight"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"} | variables,
    )


def objects(done: Result) -> list[dict[str, Any]]:
    """Return the printed lines of JSON, and check that there are no others."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def without(package: str) -> str:
    """Return the program `sidelight` as it runs where a package is not installed."""
    return f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from sidelight.__main__ import main
main()
"""


def rows(output: str) -> dict[str, list[str]]:
    """Return the table's rows by picture name; cells are separated by two or more spaces."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {row[0]: row[1:] for row in cells if len(row) > 1}


def test_each_picture_is_printed_with_label_probability_and_time(run: Run, client: sidelight.Client) -> None:
    paths = [picture(f"{seed}.png", seed=seed) for seed in range(3)]
    done = run("attribute", *paths)
    assert done.exit_code == 0, done.output
    table = rows(done.stdout)
    assert table["picture"] == ["class", "probability", "device time"]
    assert list(table) == ["picture", "0.png", "1.png", "2.png"]
    for path in paths:
        (prediction,) = client.attribute(path).predictions
        label, probability, time = table[path.name]
        assert (label, probability) == (prediction.label, f"{prediction.probability:.2f}")
        assert re.fullmatch(r"\d+ ms", time)
    assert sorted(Path().iterdir()) == paths  # no overlay unless a folder is named


def test_overlays_are_written_into_a_folder_that_is_made(run: Run, client: sidelight.Client) -> None:
    paths = [picture("a.png"), picture("b.jpg", seed=1), picture("deep/down/c.tif", seed=2)]
    done = run("attribute", *paths, "--out", "made/for it")
    assert done.exit_code == 0, done.output
    assert "3 overlays in made/for it" in done.stdout
    out = Path("made/for it")
    assert sorted(each.name for each in out.iterdir()) == ["a.png", "b.png", "c.png"]
    with Image.open(out / "a.png") as overlay:
        assert overlay.size == (32, 32)
        expected = np.asarray(client.attribute(paths[0]).overlay(0)).astype(int)
        # A map differs in its last bits with neighbors in the chunk: a color may round the other way.
        np.testing.assert_allclose(np.asarray(overlay), expected, atol=1)


def test_overlays_are_on_the_whole_pictures_if_so_asked(run: Run, client: sidelight.Client) -> None:
    paths = [picture("a.png"), picture("b.png", seed=1)]
    done = run("attribute", *paths, "--out", "out", "--save", "saved", "--original")
    assert done.exit_code == 0, done.output
    expected = np.asarray(client.attribute(paths[1]).overlay(0, original=True)).astype(int)
    for written in ("out/b.png", "saved/b/000.png"):
        with Image.open(written) as overlay:
            assert overlay.size == (50, 40)
            np.testing.assert_allclose(np.asarray(overlay), expected, atol=1)


def test_the_model_and_the_options_are_those_of_a_call(run: Run, client: sidelight.Client) -> None:
    path = picture("a.png")
    options = ["--target", 3, "--score", "logit", "--channels", "sum", "--signed", "--times-input", "--model", "small"]
    done = run("attribute", path, "--out", "out", *options)
    assert done.exit_code == 0, done.output
    predicted = client.attribute(path).predictions[0].label
    assert rows(done.stdout)["a.png"][0] == f"{predicted} (explained: cat)"
    method = sidelight.Gradient(signed=True, times_input=True)
    expected = client.attribute(path, target=3, score="logit", channels="sum", method=method).overlay(0)
    with Image.open("out/a.png") as overlay:
        np.testing.assert_allclose(np.asarray(overlay).astype(int), np.asarray(expected), atol=1)


@pytest.mark.parametrize(
    ("target", "explained"), [("ibis", "ibis"), ("9", "ibis"), ("0", "ant"), ("gnu", "gnu")], ids=lambda each: each
)
def test_a_target_is_a_class_index_or_a_label(run: Run, target: str, explained: str) -> None:
    done = run("attribute", picture("a.png"), "--target", target)
    assert done.exit_code == 0, done.output
    assert f"(explained: {explained})" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "elc"], 'no label "elc"; did you mean "elk"?'),
        (["--target", "cat"], 'label "cat" names the classes 2, 3'),
        (["--target", "10"], 'class index 10, model "small" has 0 to 9'),
        (["--target", "-1"], 'class index -1, model "small" has 0 to 9'),
        (["--target", "--5"], 'no label "--5"'),
        (["--target", "²"], 'no label "²"'),
        (["--model", "smal"], 'there is no "smal"; did you mean "small"?'),
        (["--top-k", "11"], "target.top_k.k: got 11, expected 1 to 10"),
        (["--target", "1", "--region", "0,0,1,1"], 'target.dense: model "small" returns scores for the whole image'),
        (["--method", "rise(masks=0)"], "masks"),
        (["--method", "grad_cam(layer=12)"], "layer"),
        (["--signed", "--map-dtype", "uint8"], "map_dtype"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_rejected_picture_is_printed_with_the_reason(run: Run, options: list[str], message: str) -> None:
    done = run("attribute", picture("a.png"), *options)
    assert done.exit_code == 1
    assert message in rows(done.stdout)["a.png"][0]
    assert "Traceback" not in done.output


def test_any_method_is_named_with_its_options(run: Run, client: sidelight.Client) -> None:
    path = picture("a.png")
    text = "smoothgrad(samples=3, noise_level=0.1, base=integrated_gradients(steps=4, baseline=black))"
    done = run("attribute", path, "--method", text, "--out", "out", "--score", "margin")
    assert done.exit_code == 0, done.output
    base = sidelight.IntegratedGradients(steps=4, baseline="black")
    method = sidelight.SmoothGrad(samples=3, noise_level=0.1, base=base)
    expected = client.attribute(path, method=method, score="margin").overlay(0)
    with Image.open("out/a.png") as overlay:
        np.testing.assert_allclose(np.asarray(overlay).astype(int), np.asarray(expected), atol=1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_served_by_its_bare_name(run: Run, name: str) -> None:
    rows_of_rise = "(masks=20)" if name == "rise" else ""
    done = run("attribute", picture("a.png"), "--method", name + rows_of_rise)
    assert done.exit_code == 0, done.output
    assert re.fullmatch(r"\d+ ms", rows(done.stdout)["a.png"][-1])
    assert name in " ".join(run("attribute", "--help").stdout.split())


def test_the_table_has_rows_and_errors_for_methods_that_have_them(run: Run, client: sidelight.Client) -> None:
    good = picture("good.png")
    Path("bad.png").write_bytes(b"no picture")
    done = run("attribute", good, "bad.png", "--method", "integrated_gradients(tolerance=0.2, baseline=blurred)")
    table = rows(done.stdout)
    assert table["picture"] == ["class", "probability", "rows", "error", "completeness error", "device time"]
    _, _, n_rows, error, completeness, _ = table["good.png"]
    method = sidelight.IntegratedGradients(tolerance=0.2, baseline="blurred")
    (convergence,) = client.attribute(good, method=method).convergence
    number, word = error.split()
    assert (int(n_rows), float(number)) == (convergence.rows, pytest.approx(convergence.error, rel=0.1))
    assert (convergence.is_met, word) == (True, "(met)")
    assert re.fullmatch(r"[\d.e-]+ \([\d.]+%\)", completeness)
    smooth = rows(run("attribute", good, "--method", "smoothgrad(samples=4)").stdout)
    assert smooth["picture"] == ["class", "probability", "rows", "error", "device time"]
    assert smooth["good.png"][2] == "5"


def test_the_k_most_probable_classes_are_named_and_drawn_side_by_side(run: Run, client: sidelight.Client) -> None:
    path = picture("a.png")
    done = run("attribute", path, "--top-k", 3, "--out", "out", "--save", "saved")
    assert done.exit_code == 0, done.output
    answer = client.attribute(path, target=sidelight.TopK(3))
    labels = ", ".join(each.label for each in answer.targets[0])
    assert rows(done.stdout)["a.png"][0] == f"{answer.predictions[0].label} (explained: {labels})"
    with Image.open("out/a.png") as overlay:
        assert overlay.size == (96, 32)
        last = np.asarray(overlay)[:, 64:].astype(int)
    np.testing.assert_allclose(last, np.asarray(answer.overlay(0, k=2)), atol=1)


def test_a_contrast_names_both_classes(run: Run, client: sidelight.Client) -> None:
    path = picture("a.png")
    done = run("attribute", path, "--target", "gnu", "--against", 4)
    assert done.exit_code == 0, done.output
    predicted = client.attribute(path).predictions[0].label
    assert rows(done.stdout)["a.png"][0] == f"{predicted} (explained: gnu against class 4)"


def test_a_dense_output_is_explained_over_a_region(device: str, run: Run) -> None:
    dense = nn.Conv2d(3, 4, 3, padding=1)
    spec = sidelight_server.ModelSpec(dense, input_size=(3, 32, 32), name="dense")
    with sidelight_server.serve(spec, device=device) as address:
        done = run(
            "attribute", picture("a.png"), "--target", 2, "--region", "0,0,2,2", "--save", "s", "--address", address
        )
    assert done.exit_code == 0, done.output
    map_ = np.load("s/a/maps.npy")[0]
    assert map_[:3, :3].min() > 0  # what the region of 2 × 2 sees
    assert not map_[3:].any()
    assert not map_[:, 3:].any()


def test_saved_answers_are_replayed(run: Run) -> None:
    paths = [picture("x/a.png"), picture("y/a.jpg", seed=1), picture("b.tif", seed=2)]
    done = run("attribute", *paths, "--save", "runs", "--method", "rise(masks=9)", "--map-dtype", "float16")
    assert done.exit_code == 0, done.output
    assert "3 answers in runs" in done.stdout
    assert sorted(each.name for each in Path("runs").iterdir()) == ["a", "a-2", "b"]
    for folder, path in zip(("a", "a-2", "b"), paths, strict=True):
        again = run("replay", f"runs/{folder}/answer.json", "--image", path)
        assert again.exit_code == 0, again.output
        assert f"{path.name}: " in again.stdout
    other = run("replay", "runs/a/answer.json", "--image", paths[1])
    assert other.exit_code == 1
    assert 'example 0 is not the picture "x/a.png"' in other.stderr


def test_saved_answers_are_overwritten_only_where_that_is_said(run: Run) -> None:
    path = picture("a.png")
    assert run("attribute", path, "--save", "runs").exit_code == 0
    before = Path("runs/a/answer.json").read_bytes()
    again = run("attribute", path, "--save", "runs", "--target", "3")
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr.startswith("sidelight: runs/a: this folder already has an answer")
    assert Path("runs/a/answer.json").read_bytes() == before
    assert run("attribute", path, "--save", "runs", "--target", "3", "--overwrite").exit_code == 0
    assert Path("runs/a/answer.json").read_bytes() != before


def test_a_saturated_score_is_advised_upon_once(device: str, run: Run) -> None:
    sure = nn.Sequential(small_cnn(), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        sure[1].weight.copy_(1e6 * torch.eye(10))
    spec = sidelight_server.ModelSpec(sure, input_size=(3, 32, 32))
    paths = [picture("a.png"), picture("b.png", seed=1)]
    with sidelight_server.serve(spec, device=device) as address:
        done = run("attribute", *paths, "--address", address)
        advised = run("attribute", *paths, "--address", address, "--score", "logit")
    assert done.stdout.count('Use score="logit"') == 1
    assert done.stdout.splitlines()[-1].startswith("saturated: ")
    assert "saturated" not in advised.stdout


def test_a_picture_that_fails_is_named_and_the_others_are_explained(run: Run) -> None:
    good, more = picture("good.png"), picture("more.png", seed=1)
    Path("bad.png").write_bytes(b"no picture")
    done = run("attribute", good, "bad.png", "missing.png", more, "--out", "out")
    assert done.exit_code == 1
    table = rows(done.stdout)
    assert len(table["good.png"]) == len(table["more.png"]) == 3
    assert "10 bytes are not a PNG, JPEG, WebP, TIFF, BMP, GIF or DICOM" in table["bad.png"][0]
    assert "cannot read missing.png: No such file or directory" in table["missing.png"][0]
    assert "2 overlays in out" in done.stdout
    assert sorted(each.name for each in Path("out").iterdir()) == ["good.png", "more.png"]
    assert isinstance(done.exception, SystemExit)


def test_a_folder_stands_for_the_pictures_in_it(run: Run) -> None:
    for name in ("in/b.png", "in/a.PNG", "in/deeper/c.png", "d.png"):
        picture(name)
    Path("in/notes.txt").write_text("no picture")
    done = run("attribute", "d.png", "in", "--json")
    assert done.exit_code == 0
    assert [each["picture"] for each in objects(done)] == ["d.png", "in/a.PNG", "in/b.png"]


def test_a_folder_without_pictures_is_a_usage_error(run: Run) -> None:
    Path("folder").mkdir()
    done = run("attribute", "folder")
    assert done.exit_code == 2
    assert "the folder folder has no pictures (.bmp, .dcm," in done.stderr


def test_without_any_of_its_files_a_command_does_not_wait_for_a_server(run: Run) -> None:
    done = run("attribute", "missing.png", "also.png", "--address", "localhost:1")
    assert done.exit_code == 2
    assert "no such file: missing.png, also.png" in done.stderr


def test_answers_are_printed_as_lines_of_json(run: Run, client: sidelight.Client) -> None:
    good, more = picture("good.png"), picture("more.png", seed=1)
    Path("bad.png").write_bytes(b"no picture")
    done = run("attribute", good, "bad.png", "missing.png", more, "--json", "--out", "out", "--score", "logit")
    assert done.exit_code == 1
    records = objects(done)
    assert [each["picture"] for each in records] == ["good.png", "bad.png", "missing.png", "more.png"]
    assert [each["error"] and each["error"]["type"] for each in records] == [None, None, "UnreadableFile", None]
    assert "not a PNG" in records[1]["failures"][0]["message"]
    for each, path in ((records[0], good), (records[3], more)):
        expected = client.attribute(path, score="logit").provenance
        assert each["provenance"]["score"] == "logit"
        assert each["provenance"]["example_digests"] == list(expected.example_digests)
    assert sorted(each.name for each in Path("out").iterdir()) == ["good.png", "more.png"]


def test_a_servers_facts_are_printed_as_json(run: Run, client: sidelight.Client, address: str) -> None:
    done = run("info", "--json")
    info = json.loads(done.stdout)
    assert info.pop("address") == address
    expected = json.loads(json.dumps(dataclasses.asdict(client.info())))
    assert (
        info.pop("cancellations").keys() == expected.pop("cancellations").keys()
    )  # others' requests may have been cancelled since
    assert info == expected


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["smoothgrad", "--option", "samples=3", "--option", "seed=7"], "smoothgrad(samples=3, seed=7)"),
        (["integrated_gradients", "--option", "baseline=black"], "integrated_gradients(baseline=black)"),
        (["occlusion", "--option", "window=(8, 8)"], "occlusion(window=(8, 8))"),
        (
            ["smoothgrad", "--option", "base=integrated_gradients(steps=2)"],
            "smoothgrad(base=integrated_gradients(steps=2))",
        ),
        (["gradient", "--option", "signed=True"], "gradient(signed=True)"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_options_of_a_method_may_be_given_one_by_one(run: Run, options: list[str], text: str) -> None:
    picture("a.png")
    (apart,), (whole,) = (
        objects(run("attribute", "a.png", "--json", "--method", *arguments)) for arguments in (options, [text])
    )
    assert apart["provenance"]["method"] == whole["provenance"]["method"]
    assert apart["examples"][0]["map_sha256"] == whole["examples"][0]["map_sha256"]


def test_the_shell_completes_the_names_of_methods(run: Run) -> None:
    done = run(_SIDELIGHT_COMPLETE="complete_bash", COMP_WORDS="sidelight attribute --method g", COMP_CWORD="3")
    assert done.stdout.split() == [name for name in METHODS if name.startswith("g")]


def test_names_and_labels_are_no_markup(device: str, run: Run) -> None:
    labels = [f"[red]class {i}[/red]" for i in range(10)]
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32), class_names=labels, name="net[bold]v2")
    path = picture("cat [red].png")
    with sidelight_server.serve(spec, device=device) as address:
        done = run("attribute", path, "--out", "[dim]out", SIDELIGHT_ADDRESS=address)
        by_environment = run("info", SIDELIGHT_ADDRESS=address)
    assert done.exit_code == by_environment.exit_code == 0
    assert re.fullmatch(r"\[red\]class \d\[/red\]", rows(done.stdout)["cat [red].png"][0])
    assert "1 overlays in [dim]out" in done.stdout
    assert Path("[dim]out/cat [red].png").exists()
    assert "net[bold]v2" in by_environment.stdout


def test_a_model_without_labels_is_printed_with_class_numbers(device: str, run: Run) -> None:
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32))
    with sidelight_server.serve(spec, device=device) as address:
        done = run("attribute", picture("a.png"), "--address", address)
    assert re.fullmatch(r"class \d", rows(done.stdout)["a.png"][0])


def test_pictures_of_one_name_get_overlays_of_different_names(run: Run) -> None:
    paths = [picture(name, seed=i) for i, name in enumerate(("x/a.png", "y/a.jpg", "z/a-2.png", "a.png"))]
    done = run("attribute", *paths, "--out", "out")
    assert done.exit_code == 0, done.output
    assert len(list(Path("out").iterdir())) == 4
    contents = {each.read_bytes() for each in Path("out").iterdir()}
    assert len(contents) == 4


@pytest.mark.parametrize(
    "names",
    [
        ["a.png", "b.png"],
        ["x/a.png", "y/a.png"],
        ["x/a.png", "y/a.png", "z/a-2.png"],
        ["z/a-2.png", "x/a.png", "y/a.png"],
        ["a.png", "a.png", "a.png"],
        ["x/a-2.png", "a-2-2.png", "a-2.jpg", "a.png", "y/a.png"],
        ["a.tar.gz", "a.tar.xz"],
        [".png", "out/a.png", "a.png"],
    ],
    ids=" ".join,
)
def test_names_of_overlays_are_all_different_and_no_pictures_own(names: list[str]) -> None:
    paths = [Path(name) for name in names]
    overlays = overlay_names(paths, Path("out"))
    assert len(set(overlays)) == len(names)
    assert not {Path("out", each).resolve() for each in overlays} & {path.resolve() for path in paths}


def test_no_picture_is_overwritten_by_its_overlay(run: Run) -> None:
    paths = [picture("a.png"), picture("a-2.png", seed=1), picture("sub/b.png", seed=2)]
    before = [path.read_bytes() for path in paths]
    for out in (".", "sub", Path().absolute(), "sub/.."):
        done = run("attribute", *paths, "--out", out)
        assert done.exit_code == 0, done.output
    assert [path.read_bytes() for path in paths] == before


def test_an_overlay_folder_that_is_a_file_is_named(run: Run) -> None:
    path = picture("a.png")
    done = run("attribute", path, "--out", path)
    assert done.exit_code == 1
    assert done.stderr.startswith("sidelight: --out: a.png cannot be a folder for overlays: File exists")
    done = run("attribute", path, "--save", path)
    assert done.exit_code == 1
    assert done.stderr.startswith("sidelight: --save: a.png cannot be a folder for answers: File exists")


def test_a_fault_of_every_picture_is_printed_once(run: Run) -> None:
    done = run("attribute", picture("a.png"), picture("b.png"), "--timeout", "0")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.count("timeout: got 0.0 s, expected a positive time") == 1


@pytest.mark.parametrize("command", [["attribute", "a.png"], ["info"]], ids=lambda each: each[0])
def test_without_a_server_one_line_names_the_address(run: Run, command: list[str]) -> None:
    picture("a.png")
    done = run(*command, "--address", ABSENT, "--connect-timeout", "0.1")
    assert done.exit_code == 1
    assert done.stdout.strip() == ""
    message = f"sidelight: no server answers at {ABSENT} after 0.1 s; is sidelight-server running there?"
    assert done.stderr.strip() == message
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("method", "shape"),
    [
        ("integrated_gradients(steps=3)", (3, 32, 32)),
        ("occlusion", (3, 32, 32)),
        ("expected_gradients(samples=3)", (2, 3, 32, 32)),
        ("smoothgrad(samples=2, base=integrated_gradients(steps=2))", (3, 32, 32)),
    ],
)
def test_a_baseline_may_be_an_array_in_a_file(run: Run, method: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", np.ones(shape, np.float32))
    done = run("attribute", picture("a.png"), "--method", method, "--baseline", "b.npy", "--save", "runs")
    assert done.exit_code == 0, done.output
    replayed = run("replay", "runs/a", "--image", "a.png")  # the array was saved beside the answer
    assert replayed.exit_code == 0, replayed.output


def test_a_baseline_of_a_method_without_one_is_refused(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", np.ones((3, 32, 32), np.float32))
    done = run("attribute", picture("a.png"), "--baseline", "b.npy")
    assert done.exit_code == 1
    assert "--baseline: Gradient has no baseline" in done.stderr
    assert "No such file" in run("attribute", "a.png", "--method", "occlusion", "--baseline", "c.npy").stderr


def test_the_address_is_that_of_the_option_before_that_of_the_variable(run: Run, address: str) -> None:
    assert run("info", "--address", address, SIDELIGHT_ADDRESS=ABSENT).exit_code == 0
    assert run("info", "--connect-timeout", "0.1", SIDELIGHT_ADDRESS=ABSENT).exit_code == 1


def test_info_reports_version_limits_methods_and_models(run: Run, address: str, client: sidelight.Client) -> None:
    before, server = None, client.info()
    while before != server.models:  # the chunk size is measured again some time after the start
        before = server.models
        done = run("info")
        assert done.exit_code == 0
        server = client.info()
    text = " ".join(done.stdout.split())
    assert f"sidelight-server {server.version} at {address} methods gradient, smoothgrad, integrated" in text
    assert "rows 10000 at most for one example" in text
    assert "cancellations" not in text or server.cancellations.count
    assert "guarantees equal maps within a tolerance" in text
    assert "message 64 MiB at most picture 50 megapixels at most" in text
    assert "in flight 256 batches at most, 32 of them on one stream" in text
    (model,) = server.models
    (chosen,) = (each for each in model.warmup if each.chosen)
    assert f"* {chosen.rows} rows per chunk {chosen.rows_per_second:.1f} rows/s {chosen.configuration}" in text
    for fact in ("small", "3 × 32 × 32", "10", "probability, logit, log_probability, margin", "float32", model.digest):
        assert fact in text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "short side 32, bilinear; 0 to 1, mean 0, std 1"),
        ({"resize": "exact", "pixel_range": (-1024, 1024)}, "resize exact, bilinear; -1024 to 1024, mean 0, std 1"),
        ({"resize": "48x40"}, "resize 48x40, bilinear; 0 to 1, mean 0, std 1"),
        (
            {"resize": 40, "interpolation": "bicubic", "mean": [0.25], "std": [0.5], "window": (0, 4095)},
            "short side 40, bicubic; 0 to 1, mean 0.25, std 0.5; window of 16-bit and DICOM files 0 to 4095",
        ),
    ],
    ids=["default", "range", "sides", "window"],
)
def test_info_reports_the_preprocessing(device: str, run: Run, fields: dict[str, object], expected: str) -> None:
    spec = sidelight_server.ModelSpec(small_cnn(1), input_size=(1, 32, 32), **fields)
    with sidelight_server.serve(spec, device=device) as address:
        done = run("info", "--address", address)
    assert expected in [" ".join(line.split()).removeprefix("pixels ") for line in done.stdout.splitlines()]


def test_info_describes_a_model_that_takes_any_size(device: str, run: Run) -> None:
    with sidelight_server.serve(small_cnn(), device=device) as address:
        done = run("info", "--address", address)
    assert "any C × H × W" in done.stdout
    assert "not known yet" in done.stdout  # how many classes there are is known after the first rows


@pytest.mark.parametrize(
    "command", [[], ["attribute"], ["replay"], ["info"], ["demo"]], ids=lambda each: " ".join(each)
)
def test_help_explains_every_option(run: Run, command: list[str]) -> None:
    done = run(*command, "--help")
    assert done.exit_code == 0
    assert "Usage: sidelight" in done.stdout
    completions = {
        "attribute": [
            "--address",
            "--out",
            "--model",
            "--target",
            "--score",
            "--channels",
            "--original",
            "--signed",
            "--times-input",
            "--method",
            "--top-k",
            "--against",
            "--region",
            "--map-dtype",
            "--save",
            "--option",
            "--json",
        ],
        "replay": ["--image", "--baseline", "--address", "answer.json"],
        "info": ["--address", "--json", "--connect-timeout", "SIDELIGHT_ADDRESS"],
        "demo": ["--out"],
        "": ["attribute", "replay", "info", "demo", "--version", "--install-completion"],
    }
    for word in completions.get("".join(command), []):
        assert word in done.stdout


def test_without_a_command_the_help_is_shown(run: Run) -> None:
    done = run()
    assert done.exit_code == 2
    assert "Usage: sidelight" in done.output
    assert "attribute" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribute", "a.png", "--adress", "x"], "--address"),
        (["attribute", "a.png", "--chanels", "l2"], "--channels"),
        (["info", "--conect-timeout", "1"], "--connect-timeout"),
        (["atribute", "a.png"], "attribute"),
        (["attribute"], "Missing argument"),
        (["attribute", "a.png", "--score", "prob"], "'probability', 'logit', 'log_probability', 'margin'"),
        (["attribute", "a.png", "--channels", "max"], "'max_abs', 'sum', 'mean_abs', 'l2', 'none'"),
        (["attribute", "a.png", "--timeout", "soon"], "'--timeout'"),
        (["attribute", "a.png", "--map-dtype", "f4"], "'float32', 'float16', 'uint8'"),
        (["attribute", "a.png", "--method", "smothgrad"], "did you mean 'smoothgrad'?"),
        (["attribute", "a.png", "--method", "smoothgrad(sample=2)"], "did you mean 'samples'?"),
        (
            ["attribute", "a.png", "--method", "rise", "--signed"],
            "--signed and --times-input are options only of gradient",
        ),
        (["attribute", "a.png", "--method", "gradient(squared=True)", "--times-input"], "options only of gradient"),
        (["attribute", "a.png", "--top-k", "3", "--target", "1"], "expected only without --target"),
        (["attribute", "a.png", "--against", "1"], "expected only with --target"),
        (["attribute", "a.png", "--region", "0,0,1,1"], "expected only with --target"),
        (["attribute", "a.png", "--target", "1", "--region", "0,0,1"], "expected TOP,LEFT,HEIGHT,WIDTH"),
        (["attribute", "a.png", "--target", "1", "--against", "2", "--region", "0,0,1,1"], "without --region"),
        (["attribute", "a.png", "--option", "samples=2"], "gradient got the option 'samples'"),
        (["attribute", "a.png", "--method", "smoothgrad", "--option", "sample=2"], "did you mean 'samples'?"),
        (["attribute", "a.png", "--method", "smoothgrad", "--option", "samples"], "expected NAME=VALUE"),
        (["attribute", "a.png", "--method", "rise(masks=2)", "--option", "seed=1"], "expected only a name"),
        (["replay", "answer.json", "--imge", "a.png"], "--image"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_wrong_word_ends_with_two_and_the_right_one(run: Run, arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.output


def test_the_version_is_the_clients(run: Run) -> None:
    assert run("--version").stdout == f"{sidelight.__version__}\n"


def test_the_demonstration_names_the_extra_that_it_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    done = run("demo")
    assert done.exit_code == 1
    assert "pip install 'sidelight[demo]'" in done.stderr
    assert not Path("demo").exists()


def test_as_a_process_it_prints_a_plain_table_and_writes_overlays(address: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    done = process("attribute", "a.png", "--address", address, "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rows(done.stdout)["a.png"]) == 3
    assert "\x1b" not in done.stdout
    assert (tmp_path / "out" / "a.png").exists()


def test_as_a_process_it_ends_with_one_where_a_picture_fails(address: str, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    done = process("attribute", "bad.png", cwd=tmp_path, SIDELIGHT_ADDRESS=address)
    assert done.returncode == 1
    assert "bad.png" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_it_names_the_extra_that_brings_them(package: str, tmp_path: Path) -> None:
    done = process("info", code=without(package), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"sidelight needs {package}: pip install 'sidelight[cli]'\n")


def test_another_missing_package_is_not_blamed_on_the_extra(tmp_path: Path) -> None:
    done = process("info", code=without("grpc"), cwd=tmp_path)
    assert done.returncode == 1
    assert "sidelight[cli]" not in done.stderr
    assert "grpc" in done.stderr
