"""A fixture: the file of a model's weights, which tests change."""

from pathlib import Path

import pytest

from support.models.reloadable import write_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    write_weights(path, seed=1)
    return path
