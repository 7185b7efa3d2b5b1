"""A folder with models that are slow or hang."""

import os
from pathlib import Path

import pytest

from support.servers.health import SLOW
from support.servers.processes import FACTORIES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "factories.py").write_text(FACTORIES + SLOW)
    os.mkfifo(tmp_path / "reached")
    return tmp_path
