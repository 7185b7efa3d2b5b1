"""The example clients in other languages, each in a process of its own: maps and pictures equal those of the client."""

import io
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sklearn
from PIL import Image
from sidelight_server import Engine, ModelSpec, Settings

from support import ROOT
from support.components import INTEROP
from support.models import LABELS, small_cnn
from support.servers.running import serving

WITHIN_S = 60.0
PHOTOGRAPHS = Path(sklearn.__file__).parent / "datasets" / "images"
NODE = ROOT / "examples" / "clients" / "node"

# Not all of them: Debian has several loggers there, of which one is chosen aloud.
JARS = ("grpc", "netty", "protobuf", "guava", "failureaccess", "perfmark", "opencensus", "gson")
JAVA_PATH = ":".join(
    [
        str(INTEROP / "java" / "classes"),
        *(str(jar) for name in JARS for jar in Path("/usr/share/java").glob(f"{name}*.jar")),
    ]
)

EXPLAIN = {
    "node": ["node", str(NODE / "explain.js")],
    "go": [str(INTEROP / "go" / "explain")],
    "java": ["java", "-cp", JAVA_PATH, "Explain"],
    "cpp": [str(INTEROP / "cpp" / "explain")],
}
STREAM = {"node": ["node", str(NODE / "stream.js")], "go": [str(INTEROP / "go" / "stream")]}


def languages(programs: dict[str, list[str]]) -> pytest.MarkDecorator:
    marked = [pytest.param(each, id=name, marks=pytest.mark.requires(name)) for name, each in programs.items()]
    return pytest.mark.parametrize("program", marked)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server whose maps do not depend on what runs beside them."""
    spec = ModelSpec(small_cnn(), class_names=LABELS, input_size=(3, 32, 32), resize=40, name="small")
    settings = Settings(device="cpu", threads=1, reproducible=True)
    with serving(Engine([spec], settings), "127.0.0.1:0") as server:
        yield server.server.addresses[0]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in ("china.jpg", "flower.jpg")]
    for path in paths:
        shutil.copy(PHOTOGRAPHS / path.name, path)
    return paths


def run(program: Sequence[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *map(str, arguments)], capture_output=True, text=True, timeout=WITHIN_S)


def assert_explains(line: str, path: Path, answer: sidelight.Attribution) -> None:
    """Check what a program printed and the map that it wrote."""
    (prediction,) = answer.predictions
    assert prediction is not None
    assert line == f"{path} {prediction.label} {prediction.probability:.4f}"
    assert Path(f"{path}.f32").read_bytes() == answer.maps.astype("<f4").tobytes()


@languages(EXPLAIN)
def test_a_program_gets_the_clients_map_and_picture(program: list[str], address: str, pictures: list[Path]) -> None:
    path = pictures[0]
    done = run(program, address, path)
    assert (done.returncode, done.stderr) == (0, "")
    with sidelight.connect(address) as client:
        answer = client.attribute(path)
        assert_explains(done.stdout.rstrip("\n"), path, answer)
        rendered = Image.open(io.BytesIO(Path(f"{path}.png").read_bytes()))
        np.testing.assert_array_equal(np.asarray(rendered), np.asarray(answer.overlay(0)))


@languages(EXPLAIN)
def test_a_program_reports_a_bad_file(program: list[str], address: str, tmp_path: Path) -> None:
    path = tmp_path / "no.jpg"
    path.write_bytes(b"no picture")
    done = run(program, address, path)
    assert done.returncode == 1
    assert "3 image file: 10 bytes are not a PNG" in done.stderr
    assert not Path(f"{path}.f32").exists()


@languages(STREAM)
def test_a_stream_answers_every_picture(program: list[str], address: str, pictures: list[Path]) -> None:
    done = run(program, address, *pictures)
    assert (done.returncode, done.stderr) == (0, "")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    with sidelight.connect(address) as client:
        for path in pictures:
            assert_explains(lines[str(path)], path, client.attribute(path))


@languages(STREAM)
def test_a_bad_file_of_a_stream_fails_alone(
    program: list[str], address: str, pictures: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "no.jpg"
    bad.write_bytes(b"no picture")
    done = run(program, address, bad, *pictures)
    assert done.returncode == 1
    assert f"{bad}: 3 image file: 10 bytes are not a PNG" in done.stderr
    assert len(done.stdout.splitlines()) == len(pictures)
