"""The command on the server under test."""

from pathlib import Path

import pytest
from click.testing import Result
from sidelight._cli.app import app
from typer.testing import CliRunner

from support.commands import Run


@pytest.fixture
def run(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the command in an empty folder, on the server under test and a wide terminal."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, **variables: str) -> Result:
        variables = {"SIDELIGHT_ADDRESS": address, "COLUMNS": "200", "NO_COLOR": "1"} | variables
        return CliRunner().invoke(app, [str(each) for each in arguments], env=variables, prog_name="sidelight")

    return run
