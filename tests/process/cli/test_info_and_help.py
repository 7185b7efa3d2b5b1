"""`sidelight info`, help, shell completion, wrong words, and missing packages."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sidelight
import sidelight_server
from sidelight.methods.parsing import METHODS

from support.commands import ABSENT, Run, picture, rows
from support.models import small_cnn


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


def test_a_servers_facts_are_printed_as_json(run: Run, client: sidelight.Client, address: str) -> None:
    done = run("info", "--json")
    info = json.loads(done.stdout)
    assert info.pop("address") == address
    expected = json.loads(json.dumps(dataclasses.asdict(client.info())))
    assert (
        info.pop("cancellations").keys() == expected.pop("cancellations").keys()
    )  # requests of other tests may have been cancelled since
    assert info == expected


def test_the_shell_completes_the_names_of_methods(run: Run) -> None:
    done = run(_SIDELIGHT_COMPLETE="complete_bash", COMP_WORDS="sidelight attribute --method g", COMP_CWORD="3")
    assert done.stdout.split() == [name for name in METHODS if name.startswith("g")]


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
def test_a_wrong_argument_exits_with_code_2_and_names_the_right_one(
    run: Run, arguments: list[str], message: str
) -> None:
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


def test_the_process_prints_a_plain_table_and_writes_overlays(address: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    done = process("attribute", "a.png", "--address", address, "--out", "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(rows(done.stdout)["a.png"]) == 3
    assert "\x1b" not in done.stdout
    assert (tmp_path / "out" / "a.png").exists()


def test_the_process_exits_with_code_1_where_a_picture_fails(address: str, tmp_path: Path) -> None:
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
