"""OpenMP's threads in the server's process spin briefly, unless the environment says otherwise."""

import os
import re
import subprocess
import sys

import pytest
from sidelight_server.app.openmp import SPIN_COUNT, VARIABLES, limit_spinning

TIMEOUT_S = 60


def spin_count(*flags: str, **variables: str) -> int:
    """Return the spin count that OpenMP prints, in a server that ends because it finds no model."""
    environment = {name: each for name, each in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "sidelight_server", "--model", "python:no_such_module:factory", *flags]
    ended = subprocess.run(
        command,
        env=environment | variables | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert "no_such_module" in ended.stderr
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", ended.stderr)
    if found is None:
        pytest.skip("torch does not use GNU's OpenMP here")
    return int(found[1])


def test_threads_spin_briefly_by_default() -> None:
    assert spin_count() == SPIN_COUNT


def test_dedicated_cpus_keep_openmps_own_policy() -> None:
    assert spin_count("--dedicated-cpus") > 100 * SPIN_COUNT


def test_the_environments_own_choice_is_obeyed() -> None:
    assert spin_count(OMP_WAIT_POLICY="PASSIVE") == 0
    assert spin_count(GOMP_SPINCOUNT="77") == 77


@pytest.mark.parametrize("name", VARIABLES)
def test_the_environments_own_choice_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in VARIABLES:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "77")
    before = dict(os.environ)
    limit_spinning()
    assert dict(os.environ) == before


def test_settings_are_read_without_torch() -> None:
    program = "import sys, sidelight_server.config.reading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=TIMEOUT_S).returncode == 0
