"""A fixture that records which child processes exist before each test."""

import pytest

from support.servers.decoders import BEFORE, children


@pytest.fixture(autouse=True)
def _before() -> None:
    BEFORE.clear()
    BEFORE.update(child.pid for child in children())
