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

from support import ROOT
from support.components import FLOOR

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def wheel_of(source: Path, folder: Path) -> list[str]:
    """Build a wheel, and return the names of the files in it."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        check=True,
        cwd=source,
        capture_output=True,
    )
    (wheel,) = folder.iterdir()
    return zipfile.ZipFile(wheel).namelist()


def test_a_wheel_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    names = wheel_of(ROOT, tmp_path)
    assert {name.split("/")[0] for name in names} == {
        "sidelight",
        "sidelight_server",
        f"sidelight-{PROJECT['version']}.dist-info",
    }
    for name in ("sidelight/py.typed", "sidelight/v1/attribution_pb2_grpc.pyi", "sidelight_server/models/spec.py"):
        assert name in names
    for proto in (ROOT / "proto" / "sidelight" / "v1").iterdir():
        assert f"sidelight/v1/{proto.name}" in names


@pytest.mark.parametrize("stage", ["dependencies", "package"])
def test_a_stage_of_the_image_that_builds_a_wheel_has_all_that_it_is_made_of(stage: str, tmp_path: Path) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (text,) = re.findall(rf"^FROM \S+ AS {stage}$(.*?)^FROM ", dockerfile, re.MULTILINE | re.DOTALL)
    source = tmp_path / "source"
    source.mkdir()
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert set(copied.split()) <= _sent_to_the_builder()
        subprocess.run(["cp", "-r", *copied.split(), source], check=True, cwd=ROOT)
    for made in re.findall(r"^RUN (mkdir .*?&& touch .*?) \\\n *&&", text, re.MULTILINE | re.DOTALL):
        subprocess.run(made, shell=True, check=True, cwd=source)
    names = wheel_of(source, tmp_path / "wheel")
    if stage == "package":
        assert sorted(names) == sorted(wheel_of(ROOT, tmp_path / "whole"))


def _sent_to_the_builder() -> set[str]:
    """Return the files and folders that .dockerignore, which begins with `*`, lets through."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return {line.removeprefix("!") for line in lines if line.startswith("!")}


def test_the_versions_agree() -> None:
    assert sidelight.__version__ == PROJECT["version"]


def test_the_floors_are_the_generators_age() -> None:
    floors = dict(re.match(r"([a-z]+)>=([\d.]+)", each).groups() for each in PROJECT["dependencies"])
    stubs = ROOT / "client" / "sidelight" / "v1"
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", (stubs / "attribution_pb2.py").read_text()).group(1)
    grpc = re.search(r"GENERATED_VERSION = '([\d.]+)'", (stubs / "attribution_pb2_grpc.py").read_text()).group(1)
    assert protobuf.startswith(floors["protobuf"])
    assert grpc == floors["grpcio"]


@pytest.mark.requires("floor")
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
