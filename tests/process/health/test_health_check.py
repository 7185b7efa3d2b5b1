"""`sidelight-server --check`: the health of a server as an exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sidelight_server.app.server import Server

from support.models.gate import Gate
from support.servers.health import gated
from support.servers.running import serving


def probe(*arguments: str, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "sidelight_server", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    return done.returncode, done.stderr.strip()


def test_the_health_check_reports_the_state_of_a_server(tmp_path: Path, gate: Gate) -> None:
    address = f"unix:{tmp_path}/socket"
    with serving(gated(gate), f"unix:{tmp_path}/socket") as server:
        assert probe("--check", address) == (0, "SERVING")
        assert probe(f"--check={address}", "--service", "model/gated") == (0, "SERVING")
        assert probe("--check", SIDELIGHT_LISTEN=f"{address},127.0.0.1:1") == (0, "SERVING")
        code, output = probe("--check", address, "--service", "model/other")
        assert code == 1
        assert output.startswith("NOT_FOUND")
        server.server._is_stopping = True
        server.run(_told(server.server))
        assert probe("--check", address) == (1, "NOT_SERVING")
        server.server._is_stopping = False
    code, output = probe("--check", address)
    assert code == 1
    assert output.startswith("UNAVAILABLE")


async def _told(server: Server) -> None:
    server._update_health()


@pytest.mark.parametrize(
    ("flags", "code", "fragment"),
    [
        (("--certificate", "c.pem"), 2, "--certificate and --key go together"),
        (("--key", "k.pem"), 2, "--certificate and --key go together"),
        (("--server-name", "there"), 2, "expected --ca too"),
        (("--ca", "absent.pem"), 1, "No such file or directory: 'absent.pem'"),
        (("--ca", __file__), 1, "holds no PEM certificate"),
        (("--certificate", __file__, "--key", __file__), 1, "are not a pair of a PEM certificate and its key"),
    ],
)
def test_a_health_check_with_wrong_arguments_reports_them(flags: tuple[str, ...], code: int, fragment: str) -> None:
    ended, output = probe("--check", "127.0.0.1:1", *flags)
    assert ended == code
    assert fragment in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("listen", "first"),
    [
        ("[::]:1", "[::]:1"),
        ("[::1]:1,127.0.0.1:2", "[::1]:1"),
        ('["[::1]:1", "127.0.0.1:2"]', "[::1]:1"),
        (" 127.0.0.1:1 , [::1]:2", "127.0.0.1:1"),
    ],
)
def test_the_health_check_asks_the_first_address_that_the_server_listens_on(listen: str, first: str) -> None:
    code, output = probe("--check", SIDELIGHT_LISTEN=listen)
    assert code == 1
    assert output.startswith(f"UNAVAILABLE: {first}: ")


def test_the_health_check_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--check', '127.0.0.1:1'];"
        "from sidelight_server.__main__ import main; assert main() == 1;"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_public_name_that_is_not_there_is_an_attribute_error() -> None:
    import sidelight_server

    assert set(sidelight_server.__all__) <= set(dir(sidelight_server))
    for name in sidelight_server.__all__:
        assert getattr(sidelight_server, name) is not None
    with pytest.raises(AttributeError, match="Engin"):
        _ = sidelight_server.Engin
