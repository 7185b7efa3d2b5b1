"""A server and the folder of its regions."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.models import Linear
from support.servers.running import Running, running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that the operator allows."""
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


@pytest.fixture
def server(tmp_path: Path, folder: Path, device: str) -> Iterator[Running]:
    """A server whose maps have a closed form."""
    with running(Linear(), tmp_path, device=device, shared_memory=folder, max_stream_regions=2) as server:
        yield server
