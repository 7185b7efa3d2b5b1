"""Installation: two packages in one wheel, a light client, and minimum versions that fit the stubs.

Environments here are new. They hold the wheel and its requirements, linked from the tests' environment.
"""

import contextlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sidelight
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from support import ROOT
from support.components import FLOOR

CLIENTS = [  # the oldest grpcio and protobuf, and newer Pythons
    pytest.param(FLOOR, id="floor", marks=pytest.mark.requires("floor")),
    *(pytest.param(path, id=path.parts[-3]) for path in sorted(ROOT.glob(".venv-3.*/bin/python"))),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build(target: str, source: Path, folder: Path) -> Path:
    """Build a wheel or an sdist of a source tree into a new folder, and return its path."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder],
        check=True,
        cwd=source,
        capture_output=True,
    )
    (built,) = folder.iterdir()
    return built


def wheel_of(source: Path, folder: Path) -> list[str]:
    """Build a wheel, and return the names of the files in it."""
    return zipfile.ZipFile(build("wheel", source, folder)).namelist()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return message_from_bytes(zipfile.ZipFile(wheel).read(f"sidelight-{PROJECT['version']}.dist-info/METADATA"))


def test_a_wheel_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    names = wheel_of(ROOT, tmp_path)
    assert {name.split("/")[0] for name in names} == {
        "sidelight",
        "sidelight_server",
        f"sidelight-{PROJECT['version']}.dist-info",
    }
    for name in ("sidelight/py.typed", "sidelight/v1/attribution_pb2_grpc.pyi", "sidelight_server/config/spec.py"):
        assert name in names
    for proto in (ROOT / "proto" / "sidelight" / "v1").iterdir():
        assert f"sidelight/v1/{proto.name}" in names


def _with_extras(requirement: Requirement) -> set[str]:
    return {f"{requirement.name}[{extra}]" for extra in requirement.extras}


def required(requirements: list[str], extras: set[str], known: set[str]) -> set[str]:
    """Return the distributions and `distribution[extra]` that requirements lead to, beside those that are `known`."""
    for requirement in map(Requirement, requirements):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": each}) for each in extras | {""}):
            continue
        if not {requirement.name, *_with_extras(requirement)} <= known:
            known.update({requirement.name, *_with_extras(requirement)})
            with contextlib.suppress(PackageNotFoundError):
                required(distribution(requirement.name).requires or [], requirement.extras, known)
    return known


def link(package: Distribution, site: Path) -> None:
    """Make an installed distribution importable from another `site-packages`."""
    origin = Path(str(package.locate_file("")))
    for file in package.files or ():
        if ".." in file.parts:
            continue  # a script
        depth = 1  # folders without an __init__ are shared between distributions: `google`, say
        while depth < len(file.parts) and not (origin.joinpath(*file.parts[:depth]) / "__init__.py").exists():
            depth += 1
        place = site.joinpath(*file.parts[:depth])
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(origin.joinpath(*file.parts[:depth]))


class Environment(NamedTuple):
    """A virtual environment with the wheel, what it requires and the extras that were asked for."""

    folder: Path

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        program, *arguments = map(str, command)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SIDELIGHT"))}
        return subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=self.folder, env=clean, check=False, capture_output=True, text=True, timeout=60,
        )  # fmt: skip


def environment(folder: Path, wheel: Path, metadata: Message, *extras: str) -> Environment:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder / "bin" / "python",
         "install", "--quiet", "--no-index", "--no-deps", "--no-compile", wheel],
        check=True,
    )  # fmt: skip
    (site,) = folder.glob("lib/python*/site-packages")
    for name in required(metadata.get_all("Requires-Dist", []), set(extras), set()):
        if "[" not in name and name != "sidelight":
            link(distribution(name), site)
    return Environment(folder)


def test_the_client_without_extras_reports_what_each_command_needs(
    wheel: Path, metadata: Message, tmp_path: Path
) -> None:
    bare = environment(tmp_path / "bare", wheel, metadata)
    done = bare.run("python", "-W", "error", "-c", "import sidelight, sidelight.aio; print(sidelight.__version__)")
    assert (done.stdout.strip(), done.stderr) == (PROJECT["version"], "")
    for command in (["--help"], ["--model", "hf:none"], ["--check"]):
        done = bare.run("sidelight-server", *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "sidelight-server needs torch: pip install 'sidelight[server]'\n"
    done = bare.run("python", "-c", "from sidelight_server import serve")
    assert done.stderr.endswith("ModuleNotFoundError: sidelight_server needs torch: pip install 'sidelight[server]'\n")
    done = bare.run("sidelight", "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"sidelight needs (rich|typer): pip install 'sidelight\[cli\]'\n", done.stderr)


def test_the_extras_bring_what_the_commands_import(wheel: Path, metadata: Message, tmp_path: Path) -> None:
    whole = environment(tmp_path / "whole", wheel, metadata, "cli", "server")
    assert "usage: sidelight-server" in whole.run("sidelight-server", "--help").stdout
    program = """
import subprocess, sys, sidelight_server, torch
assert sidelight_server.__file__.startswith(sys.prefix), sidelight_server.__file__
network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
with sidelight_server.serve(sidelight_server.ModelSpec(network, input_size=(3, 2, 2), name="two")) as address:
    sys.exit(subprocess.run([sys.prefix + "/bin/sidelight", "info", "--address", address]).returncode)
"""
    done = whole.run("python", "-c", program)
    assert done.returncode == 0, done.stderr
    assert "two" in done.stdout


def test_the_sdist_holds_all_that_is_tracked(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone: nothing says which files are tracked")
    tracked, untracked = (
        set(subprocess.run(["git", "ls-files", "-z", *options], check=True, cwd=ROOT, capture_output=True, text=True)
            .stdout.rstrip("\0").split("\0"))
        for options in ([], ["--others", "--exclude-standard"])
    )  # fmt: skip
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    assert not tracked - names
    assert names <= tracked | untracked


def test_the_sdist_builds_the_wheel_that_the_clone_builds(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert build("wheel", source, tmp_path / "wheel").read_bytes() == wheel.read_bytes()


def test_what_an_index_shows_leads_to_files_of_the_release(metadata: Message) -> None:
    links = re.findall(r"\]\((.+?)\)", metadata.get_payload())
    home = metadata.get_all("Project-URL", [])[0].partition(", ")[2]
    assert all(each.startswith("https://") for each in links)
    ours = [
        re.sub(r"#.*", "", each)
        for each in links
        if each.startswith((home, home.replace("//github", "//raw.githubusercontent")))
    ]
    assert len(ours) > 10
    for each in ours:
        path = each.partition(f"/v{PROJECT['version']}/")[2]
        assert path, each
        assert (ROOT / path).exists(), each


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


def test_the_lock_has_a_hash_for_all_that_the_tests_import_and_lint_runs() -> None:
    lock = (ROOT / ".ci" / "requirements.lock").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)(?: ;[^\\\n]*)? \\\n    --hash=sha256:", lock, re.MULTILINE))
    constraints = dict(
        re.findall(r"^(.+)==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    constraints = {canonicalize_name(name): version for name, version in constraints.items()}
    assert pins.items() <= (pins | constraints).items()
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    wanted = required(["sidelight[demo]", *groups["lint"], *groups["test"]], set(), set())
    of_torch = required(distribution("torch").requires or [], set(), set()) | {"torch"}
    names = {canonicalize_name(name) for name in wanted - of_torch if "[" not in name}
    missing = names - set(pins) - {"sidelight"}
    assert not missing, "run `make lock`"


def test_the_versions_agree() -> None:
    assert sidelight.__version__ == PROJECT["version"]


def test_the_floors_are_the_generators_age() -> None:
    floors = dict(re.match(r"([a-z]+)>=([\d.]+)", each).groups() for each in PROJECT["dependencies"])
    stubs = ROOT / "client" / "sidelight" / "v1"
    protobuf = re.search(r"Protobuf Python Version: ([\d.]+)", (stubs / "attribution_pb2.py").read_text()).group(1)
    grpc = re.search(r"GENERATED_VERSION = '([\d.]+)'", (stubs / "attribution_pb2_grpc.py").read_text()).group(1)
    assert protobuf.startswith(floors["protobuf"])
    assert grpc == floors["grpcio"]


@pytest.mark.parametrize("python", CLIENTS)
def test_an_older_client_works_with_the_newest_server(
    python: Path, address: str, client: sidelight.Client, tmp_path: Path
) -> None:
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
    subprocess.run([python, "-W", "error", "-c", program, address, tmp_path], check=True, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "maps.npy"), client.attribute(pixels).maps)
    assert (tmp_path / "000.png").exists()
