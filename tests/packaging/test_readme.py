"""The code of README.md, the tutorial and the how-to guides of the client runs as shown: Python, commands, installing.

It runs in a folder of its own; only the socket's path differs.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sidelight
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import nn

from support import ROOT
from support.models import small_cnn

SOCKET = "/run/sidelight.sock"  # the pages'
PAGES = {
    name: re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for name in (
        "README.md",
        "docs/tutorial/first-maps.md",
        "docs/how-to/call-from-python.md",
        "docs/how-to/choose-a-method.md",
        "docs/how-to/migrate.md",
        "docs/how-to/use-the-command-line.md",
        "docs/how-to/replace-pyhealth.md",
        "docs/how-to/load-test.md",
    )
}
BLOCKS = [block for blocks in PAGES.values() for block in blocks]
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = list(dict.fromkeys(line for language, text in BLOCKS if language == "sh" for line in text.splitlines()))
CLIENT = [
    (page, text)
    for page, blocks in PAGES.items()
    for language, text in blocks
    if language == "python" and "sidelight.connect(" in text
]


class Folder:
    """A working folder with the tutorial's files, and a server on its model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = str(path / "sidelight.sock")

    def here(self, text: str) -> str:
        """Return a text of a page with the socket that this server listens on."""
        return text.replace(SOCKET, self.socket)

    def arguments(self, line: str) -> list[str]:
        """Return a line for the shell as the program's path and its arguments, without the comment."""
        program, *arguments = shlex.split(self.here(line), comments=True)
        return [str(Path(sys.executable).parent / program), *arguments]

    def run(self, line: str, *more: str) -> str:
        done = subprocess.run(
            [*self.arguments(line), *more],
            cwd=self.path,
            env=os.environ | {"SIDELIGHT_ADDRESS": f"unix:{self.socket}"},
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout


def commands(program: str) -> list[str]:
    """Return the shell lines that call a program, each once and without its comment."""
    lines = (shlex.join(shlex.split(line, comments=True)) for line in COMMANDS if line.startswith(f"{program} "))
    return list(dict.fromkeys(lines))


def python(word: str) -> str:
    """Return the one block of Python that has a word in it."""
    (block,) = (text for text in PYTHON if word in text)
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    folder = Folder(tmp_path_factory.mktemp("readme"))
    (folder.path / "mine.py").write_text(python("def factory"), encoding="utf-8")
    subprocess.run([sys.executable, "-c", python("save_file(")], cwd=folder.path, check=True, timeout=60)
    noise = np.random.default_rng(0)
    (folder.path / "photos").mkdir()
    for name in ("cat.png", "dog.png", "photos/cup.png"):
        Image.fromarray(noise.integers(0, 256, (260, 300, 3), np.uint8)).save(folder.path / name)
    (line,) = commands("sidelight-server")
    with (folder.path / "log").open("wb") as log:
        server = subprocess.Popen(folder.arguments(line), cwd=folder.path, stdout=log, stderr=log)
    try:
        with sidelight.connect(f"unix:{folder.socket}", connect_timeout=60) as client:
            client.info()
        yield folder
    finally:
        server.terminate()
        assert server.wait(30) == 0, (folder.path / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize(("page", "text"), CLIENT, ids=[page for page, _ in CLIENT])
def test_the_client_does_what_is_shown(folder: Folder, monkeypatch: pytest.MonkeyPatch, page: str, text: str) -> None:
    monkeypatch.chdir(folder.path)
    made = re.findall(r'\.save(?:fig)?\("(.+?)"', text)
    for name in made:
        if Path(name).is_file():
            Path(name).unlink()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(folder.here(text), page, "exec"), names)
    assert names["answer"].index in range(100)  # the last of a stream's, or 0
    assert made
    assert all(Path(name).exists() for name in made)


class Classifier(nn.Module):
    """A classifier as PyHealth has them: keywords in, a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_cnn()

    def forward(self, *, image: torch.Tensor, label: torch.Tensor, **_: object) -> dict[str, torch.Tensor]:
        return {"y_prob": self.network(image).softmax(1), "y_true": label}


def test_the_drop_in_class_does_what_is_shown(floats: torch.Tensor) -> None:
    plt.switch_backend("Agg")
    given = {"plt": plt, "model": Classifier(), "batch": {"image": floats, "label": torch.tensor([0, 1, 0, 1, 0])}}
    before = set(plt.get_fignums())
    exec(compile(python("sidelight.pyhealth"), "replace-pyhealth.md", "exec"), given)
    assert set(plt.get_fignums()) > before
    plt.close("all")


@pytest.mark.parametrize("line", commands("sidelight"))
def test_a_command_does_what_is_shown(folder: Folder, line: str) -> None:
    if "replay" in line and not (folder.path / "runs").exists():
        for earlier in commands("sidelight"):  # the answer that is computed again
            if "--save runs/" in earlier:
                folder.run(earlier)
    folder.run(line, *(["--duration", "0.3"] if "bench" in line else []))
    for made in re.findall(r"--(?:out|save|plot) (\S+)", line):
        assert (folder.path / made).exists()


def test_all_code_is_run() -> None:
    others = [text for text in PYTHON if "sidelight.connect(" not in text]
    assert len(CLIENT) == 5
    assert len(others) == 3  # the factory, its weights, PyHealth's class
    others = {line.split()[0] for line in COMMANDS if line} - {"sidelight", "sidelight-server"}
    assert others == {"make", "pip"}


def test_the_install_commands_can_be_resolved(tmp_path: Path) -> None:
    (torch_line,) = (line for line in commands("pip") if "torch==" in line)
    lines = [line for line in commands("pip") if line != torch_line]
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert shlex.split(torch_line, comments=True)[-1] in constraints
    for line in lines:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(line, comments=True),
             "--dry-run", "--no-index", "--no-build-isolation", "--ignore-installed", "--no-deps"],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "does not provide the extra" not in done.stderr
        assert "Would install sidelight-" in done.stdout


def test_each_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/*.md")]
    for page in pages:
        for named in re.findall(r"sidelight\[([\w,]+)\]", page.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= set(extras), page


def test_each_target_of_make_that_is_shown_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands("make"):
        assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line
