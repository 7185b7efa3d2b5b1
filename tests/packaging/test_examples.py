"""The examples run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from support import ROOT
from support.components import INFERENCE, TRITON_SERVER

EXAMPLES = ROOT / "examples"
TIMEOUT_S = 280

pytestmark = pytest.mark.timeout(300)  # some train a network


def run(script: str, *arguments: object) -> str:
    return subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    ).stdout


def test_a_model_that_was_just_trained_is_explained(tmp_path: Path) -> None:
    printed = run("train_and_explain.py", tmp_path / "digits.png")
    n_right = int(printed.split()[0])
    assert n_right >= 11  # of 12 training examples; the network reaches 98 % on held-out ones
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.width > 600


def test_a_folder_is_streamed(address: str, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", tmp_path / "why"
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((40, 50), 60).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    printed = run("explain_folder.py", address, folder, out)
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png", "2.png"]
    assert "broken.png: image file: 10 bytes are not a PNG" in printed


def test_a_picture_is_explained_by_every_method(address: str, tmp_path: Path) -> None:
    Image.effect_noise((40, 50), 60).save(tmp_path / "noise.png")
    printed = run("every_method.py", address, tmp_path / "noise.png", tmp_path / "methods.png")
    assert len(printed.splitlines()) == 12
    with Image.open(tmp_path / "methods.png") as picture:
        assert picture.height > picture.width


def test_a_synthetic_radiograph_is_explained_by_its_spot(tmp_path: Path) -> None:
    printed = run("chest_xray/explain.py", tmp_path)
    assert "synthetic" in printed
    sick = [line for line in printed.splitlines() if "truly COVID, predicted COVID" in line]
    assert len(sick) == 2
    (drop_in,) = (line for line in printed.splitlines() if line.startswith("PyHealth's class"))
    for line in (*sick, drop_in):  # the spot is 1.5 % of the picture
        assert int(line.partition("%")[0].rpartition(" ")[2]) > 10
    assert "synthetic.dcm: predicted COVID" in printed
    pictures = {"gallery.png", "saliency.png", "dicom.png"}
    assert {path.name for path in tmp_path.iterdir()} == pictures | {"synthetic.dcm", "synthetic.safetensors"}


def test_a_hugging_face_folder_is_served(tmp_path: Path) -> None:
    printed = run("hugging_face.py", tmp_path / "why.png")
    assert "random" in printed
    assert "3 classes: cat, dog, rocket" in printed
    assert "grad_cam: " in printed
    with Image.open(tmp_path / "why.png") as picture:
        assert picture.width > 600


@pytest.mark.nightly
def test_two_models_stand_side_by_side(tmp_path: Path) -> None:
    printed = run("two_models.py", tmp_path / "why.png")
    assert "exact: version 1, float32, " in printed
    assert "fast: version 1, bfloat16+fold+channels_last, " in printed
    assert printed.splitlines()[-1] == "fast: version 2 serves now"
    assert (tmp_path / "why.png").exists()


@pytest.mark.slow
@pytest.mark.requires("inference", "triton_server")
def test_a_triton_and_sidelight_agree_until_one_has_another_file() -> None:
    pythons = (each / "bin" / "python" for each in (TRITON_SERVER, INFERENCE))
    first, replaced, second = run("triton_beside/run.py", *pythons).splitlines()
    assert first == "1797 explained, 0 of another class than Triton's"
    assert "Sidelight serves version 2" in replaced
    explained, _, differ = second.partition(" explained, ")
    assert explained == "1797"
    assert int(differ.split()[0]) > 0
