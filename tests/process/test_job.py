"""The command `sidelight job`, with a Ray of its own: files and exit codes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import sidelight
import sidelight_server
from PIL import Image

from support import TESTS
from support.models import sized_cnn
from support.tolerances import NEIGHBORS

MODEL = "python:support.models:sized_cnn"


def job(folder: Path, *arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = ["-c", code] if code else ["-m", "sidelight"]
    return subprocess.run(
        [sys.executable, *command, "job", "--output", "maps.parquet", "--model", MODEL, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(TESTS), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(5):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    (folder / "bad.png").write_text("no picture")
    return folder


@pytest.mark.serial  # Ray takes both cores
@pytest.mark.slow
def test_a_job_writes_one_row_for_each_picture(pictures: Path, tmp_path: Path) -> None:
    done = job(tmp_path, "--input", "pictures/*.png", "--part-rows", "2", "--actors", "1")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("maps.parquet: 6 rows, 6 of them now, ")
    assert done.stdout.endswith("; 1 failed, see maps.parquet/_failures.csv\n")

    table = pq.read_table(tmp_path / "maps.parquet").sort_by("path")
    assert table["path"].to_pylist() == sorted(map(str, pictures.iterdir()))
    good = sorted(set(pictures.iterdir()) - {pictures / "bad.png"})
    with sidelight_server.serve(sized_cnn(), threads=1, device="cpu") as address, sidelight.connect(address) as client:
        answer = client.attribute(good)
    maps = table["map"].combine_chunks().to_numpy_ndarray()[:5]
    np.testing.assert_allclose(maps, answer.maps, rtol=0, atol=NEIGHBORS * answer.maps.max())
    assert table["predicted"].to_pylist() == [*(each.index for each in answer.predictions), -1]

    provenance = json.loads((tmp_path / "maps.parquet" / "_provenance.json").read_bytes())
    assert {each["model_digest"] for each in provenance.values()} == {answer.provenance.model_digest}
    assert set(table["provenance"].to_pylist()) == set(provenance)
    with (tmp_path / "maps.parquet" / "_failures.csv").open() as file:
        (failure,) = csv.DictReader(file)
    assert failure["path"] == str(pictures / "bad.png")
    assert "not a PNG, JPEG" in failure["failure"]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--input", "nowhere/*.png"], "sidelight: --input: no file matches 'nowhere/*.png'"),
        (["--input", "pictures", "--method", "gradiant"], "did you mean 'gradient'"),
        (["--input", "pictures", "--setting", "threads"], "got 'threads', expected NAME=VALUE"),
    ],
)
def test_wrong_arguments_are_reported_before_ray_starts(
    pictures: Path, tmp_path: Path, arguments: list[str], fragment: str
) -> None:
    done = job(tmp_path, *arguments)
    assert done.returncode != 0
    assert fragment in done.stderr
    assert not (tmp_path / "maps.parquet").exists()


def test_without_ray_it_says_what_to_install(pictures: Path, tmp_path: Path) -> None:
    without = "import sys; sys.modules['ray'] = None; from sidelight.__main__ import main; main()"
    done = job(tmp_path, "--input", "pictures", code=without)
    assert (done.returncode, done.stderr) == (1, "sidelight: sidelight job needs ray: pip install 'sidelight[ray]'\n")
