"""`sidelight attribute`: pictures, models, targets and methods, and the table that it prints."""

import re
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from PIL import Image
from sidelight.methods.parsing import METHODS
from torch import nn

from support.commands import ABSENT, Run, objects, picture, rows
from support.models import small_cnn


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


def test_the_advice_for_saturated_scores_is_printed_once(device: str, run: Run) -> None:
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
