"""A folder of model files, from which factories can be imported."""

import os
from pathlib import Path

import pytest

from support.models.factories import write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    write_files(folder)
    return folder


@pytest.fixture(autouse=True)
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, without any of the server's environment variables."""
    monkeypatch.chdir(folder)
    for name in os.environ:
        if name.upper().startswith("SIDELIGHT_"):
            monkeypatch.delenv(name)
    return folder
