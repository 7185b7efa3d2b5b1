"""Sources: `onnx:FILE`. In a process of its own, because the tests' environment does not have onnx2torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import TESTS
from support.components import ONNX
from support.models.sources import refusal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The results of the cases, by name."""
    path = os.pathsep.join([str(ONNX), str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    ran = subprocess.run(
        [sys.executable, "-m", "support.models.onnx_cases"],
        cwd=tmp_path_factory.mktemp("onnx"),
        env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout.splitlines()[-1]))


@pytest.mark.requires("onnx")
def test_a_network_is_served_as_torch_computes_it(found: dict[str, object]) -> None:
    assert found["served"] < 1e-5  # the largest difference, as a share of the largest value


@pytest.mark.requires("onnx")
def test_a_network_of_a_static_batch_is_detected(found: dict[str, object]) -> None:
    assert found["static"] == [[2, 2], [3, 16, 16]]
    assert found["dynamic"] == [None, [3, 16, 16]]
    assert found["served static"] < 1e-5


@pytest.mark.requires("onnx")
def test_a_network_as_torch_exports_it_by_default_is_served_as_torch_computes_it(found: dict[str, object]) -> None:
    assert found["exported"] == [None, [3, 16, 16]]
    assert found["outputs exported"] < 1e-6
    assert found["served exported"] < 1e-5


@pytest.mark.requires("onnx")
def test_a_packaged_classifier_answers_as_the_reference_does(found: dict[str, object]) -> None:
    assert found["packaged outputs"] < 1e-4
    assert found["packaged gradient"] > 0


@pytest.mark.requires("onnx")
def test_weights_beside_the_file_are_read_and_watched(found: dict[str, object]) -> None:
    assert found["external"] < 1e-6
    assert found["watched"] == ["beside.onnx", "weights.bin"]


REFUSALS = {
    "weights in another folder": 'model: outside.onnx: has weights in "../secret.bin", expected a file in the same',
    "weights anywhere": 'model: anywhere.onnx: has weights in "/',
    "missing": "model: gone.onnx does not exist",
    "folder": "model: folder.onnx: is a folder, expected a file",
    "half": "model: half.onnx: ",
    "text": "model: text.onnx: ",
    "empty": "model: empty.onnx: ",
    "two inputs": "model: two.onnx: takes x [2, 3, 16, 16], y [2, 3, 16, 16], expected one floating input",
    "an operator that has no equal": "model: strange.onnx: ",
    "an operator of a newer set": "model: gelu.onnx: its operators, of opset 20, cannot be read: ",
}


@pytest.mark.requires("onnx")
@pytest.mark.parametrize(("case", "prefix"), REFUSALS.items(), ids=REFUSALS)
def test_a_file_that_cannot_be_served_is_refused(case: str, prefix: str, found: dict[str, object]) -> None:
    message = str(found[case])
    assert message.startswith(prefix)
    assert len(message.splitlines()) == 1


@pytest.mark.requires("onnx")
@pytest.mark.parametrize("case", ["an operator that has no equal", "an operator of a newer set"])
def test_the_error_for_an_unsupported_operator_says_what_to_do(case: str, found: dict[str, object]) -> None:
    assert str(found[case]).endswith("; export the model with torch.onnx.export(…, dynamo=False, opset_version=17)")


def test_without_the_extra_a_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"\0")
    assert refusal(f"onnx:{tmp_path}/net.onnx") == "onnx: needs the extra: pip install 'sidelight[onnx]'"
