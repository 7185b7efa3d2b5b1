"""What is installed: two packages in one wheel, a light client, and floors that the stubs agree with."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sidelight

ROOT = Path(__file__).parent.parent
FLOOR = ROOT / ".venv-floor" / "bin" / "python"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

needs_floor = pytest.mark.skipif(not FLOOR.exists(), reason="make setup makes the environment of the oldest versions")


def test_a_wheel_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    (wheel,) = tmp_path.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "sidelight",
        "sidelight_server",
        f"sidelight-{PROJECT['version']}.dist-info",
    }
    for name in ("sidelight/py.typed", "sidelight/v1/attribution_pb2_grpc.pyi", "sidelight_server/models/spec.py"):
        assert name in names
    for proto in (ROOT / "proto" / "sidelight" / "v1").iterdir():
        assert f"sidelight/v1/{proto.name}" in names


def test_the_versions_agree() -> None:
    assert sidelight.__version__ == PROJECT["version"]


def test_the_floors_are_the_generators_age() -> None:
    floors = dict(re.match(r"([a-z]+)>=([\d.]+)", each).groups() for each in PROJECT["dependencies"])
    stubs = ROOT / "client" / "sidelight" / "v1"
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", (stubs / "attribution_pb2.py").read_text()).group(1)
    grpc = re.search(r"GENERATED_VERSION = '([\d.]+)'", (stubs / "attribution_pb2_grpc.py").read_text()).group(1)
    assert protobuf.startswith(floors["protobuf"])
    assert grpc == floors["grpcio"]


@needs_floor
def test_the_oldest_versions_talk_to_the_newest(address: str, client: sidelight.Client, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    program = """
import sys, numpy, sidelight
heavy = {"torch", "sidelight_server", "rich", "typer", "pydantic"} & set(sys.modules)
assert not heavy, heavy
address, folder = sys.argv[1:]
with sidelight.connect(address) as client:
    pixels = numpy.load(folder + "/pixels.npy")
    (streamed,) = client.stream([pixels])
    numpy.save(folder + "/maps.npy", client.attribute(pixels).maps)
    assert (streamed.maps == client.attribute(pixels).maps).all()
    client.attribute(pixels).save(folder)
"""
    subprocess.run([FLOOR, "-W", "error", "-c", program, address, tmp_path], check=True, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "maps.npy"), client.attribute(pixels).maps)
    assert (tmp_path / "000.png").exists()
