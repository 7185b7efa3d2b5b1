"""The public names of the client, and what importing it loads."""

import inspect
import subprocess
import sys
from types import ModuleType

import pytest
import sidelight
from sidelight import exceptions


def test_all_lists_every_public_name_once() -> None:
    assert len(set(sidelight.__all__)) == len(sidelight.__all__)
    public = {name for name in vars(sidelight) if not name.startswith("_")}
    # Three submodules are there only if a test of this process has imported them.
    assert public - set(sidelight.__all__) - {"page", "pyhealth", "testing"} == {"v1", "visualization"}
    assert set(sidelight.__all__) <= public
    assert len(sidelight.__all__) <= 35  # what a newcomer reads; the rest is a level down
    errors = {name for name, each in vars(exceptions).items() if inspect.isclass(each) and issubclass(each, Exception)}
    assert {name for name in errors if not name.startswith("_")} == set(exceptions.__all__)


@pytest.mark.parametrize("module", [sidelight, sidelight.exceptions, sidelight.methods, sidelight.results])
def test_every_public_name_has_a_docstring(module: ModuleType) -> None:
    assert module.__doc__
    assert all(getattr(module, name).__doc__ for name in module.__all__)


def test_a_name_of_the_top_level_is_the_one_of_its_module() -> None:
    for module in (sidelight.exceptions, sidelight.methods, sidelight.results):
        for name in set(module.__all__) & set(sidelight.__all__):
            assert getattr(module, name) is getattr(sidelight, name)


def test_importing_the_client_brings_neither_server_nor_torch_nor_a_command_line() -> None:
    code = "import sys, sidelight; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    modules = done.stdout.split()
    packages = {name.partition(".")[0] for name in modules}
    assert "sidelight" in packages
    assert not packages & {"torch", "sidelight_server", "typer", "click", "rich", "pydantic", "matplotlib", "skimage"}
    assert not [name for name in modules if name.startswith("PIL.") and name.endswith("Plugin")]
    assert not {"sidelight._cli.app", "sidelight._cli.tables", "sidelight._cli.demo"} & set(modules)
    assert not done.stderr
