"""TLS: which clients and servers accept each other, and the error messages."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import sidelight
import sidelight_server
from PIL import Image
from sidelight import TLS
from sidelight._cli.app import app
from sidelight_server import ConfigurationError, ModelSpec
from typer.testing import CliRunner, Result

from support.certificates import DAY, Authority, Pair
from support.models import small_cnn
from support.servers.tls import IMAGE, PATIENCE_S, handshake, serving


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "other")


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Iterator[str]:
    """A server that requires a client certificate."""
    with serving(authority.pair(), tls_client_ca=authority.path) as address:
        yield address


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("how", [str, Path, TLS], ids=["text", "path", "TLS"])
def test_a_client_that_trusts_the_authority_is_answered(
    address: str, authority: Authority, host: str, how: Callable[[Path], object]
) -> None:
    tls = TLS(ca=authority.path) if how is TLS else how(authority.path)
    there = address.replace("127.0.0.1", host)
    with sidelight.connect(there, tls=tls, connect_timeout=PATIENCE_S) as client:
        assert client.attribute(IMAGE).maps.shape == (1, 32, 32)
        assert [answer.error for answer in client.stream([IMAGE, IMAGE])] == [None, None]


def test_a_server_name_that_the_certificate_contains_can_be_set(authority: Authority) -> None:
    with serving(authority.pair("sidelight.example")) as address:
        tls = TLS(ca=authority.path, server_name="sidelight.example")
        with sidelight.connect(address, tls=tls, connect_timeout=PATIENCE_S) as client:
            assert client.info().models


@pytest.mark.parametrize("how", ["file", "folder", "gRPC's own"])
def test_an_authority_that_the_system_trusts_is_accepted(
    address: str, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path if how == "file" else tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    if how == "folder":  # the name that OpenSSL expects does not matter here
        (tmp_path / "0a1b2c3d.0").symlink_to(authority.path)
    with sidelight.connect(address, tls=True, connect_timeout=PATIENCE_S) as client:
        if how == "gRPC's own":
            with pytest.raises(sidelight.Unavailable, match="not signed by an authority"):
                client.info()
        else:
            assert client.info().models


def test_the_asynchronous_client_uses_tls(address: str, authority: Authority) -> None:
    async def explain() -> tuple[int, ...]:
        async with sidelight.aio.connect(address, tls=authority.path, connect_timeout=PATIENCE_S) as client:
            return (await client.attribute(IMAGE)).maps.shape

    assert asyncio.run(explain()) == (1, 32, 32)


def faults() -> dict[str, tuple[Callable[[Authority, Authority], Pair], Callable[[Authority, Authority], object], str]]:
    return {
        "public authorities": (lambda a, _: a.pair(), lambda *_: True, "not signed by an authority"),
        "another authority": (lambda a, _: a.pair(), lambda _, o: o.path, "not signed by an authority"),
        "another name": (lambda a, _: a.pair("elsewhere.example"), lambda a, _: a.path, "for another name"),
        "expired": (lambda a, _: a.pair(until=-DAY), lambda a, _: a.path, "has expired"),
    }


@pytest.mark.parametrize("case", faults())
def test_a_certificate_that_is_not_right_is_reported_at_once(case: str, authority: Authority, other: Authority) -> None:
    pair, trusted, pattern = faults()[case]
    with (
        serving(pair(authority, other)) as address,
        sidelight.connect(address, tls=trusted(authority, other), connect_timeout=1e9) as client,
        pytest.raises(sidelight.Unavailable, match=f"^no connection to {address}: TLS: .*{pattern}"),
    ):
        client.info()


def test_the_asynchronous_client_gets_the_error_at_once_too(address: str, other: Authority) -> None:
    async def ask() -> None:
        async with sidelight.aio.connect(address, tls=other.path, connect_timeout=1e9) as client:
            await client.info()

    with pytest.raises(sidelight.Unavailable, match=r"TLS: .*not signed by an authority"):
        asyncio.run(ask())


def test_a_stream_gets_the_error_at_once_too(address: str, other: Authority) -> None:
    with (
        sidelight.connect(address, tls=other.path, connect_timeout=1e9) as client,
        pytest.raises(sidelight.Unavailable, match=r"TLS: .*not signed by an authority"),
    ):
        list(client.stream([IMAGE]))


def test_a_server_without_tls_is_reported_at_once(authority: Authority) -> None:
    with (
        sidelight_server.serve(small_cnn(), listen=("127.0.0.1:0",), device="cpu", threads=1) as address,
        sidelight.connect(address, tls=authority.path, connect_timeout=1e9) as client,
        pytest.raises(sidelight.Unavailable, match="TLS: the server there does not use TLS"),
    ):
        client.info()


def test_a_client_without_tls_is_given_the_likely_cause(address: str) -> None:
    with (
        sidelight.connect(address, connect_timeout=1) as client,
        pytest.raises(sidelight.Unavailable, match="ends each connection at once: if it uses TLS, pass tls="),
    ):
        client.info()


def test_of_several_servers_one_with_a_wrong_certificate_is_passed_over(
    address: str, authority: Authority, other: Authority
) -> None:
    with (
        serving(other.pair()) as wrong,
        sidelight.connect([wrong, address], tls=authority.path, connect_timeout=PATIENCE_S) as client,
    ):
        for _ in range(4):
            assert client.info().models


def test_a_client_connects_once_the_certificate_is_corrected(authority: Authority, other: Authority) -> None:
    pair = other.pair()
    with (
        serving(pair) as address,
        sidelight.connect(address, tls=authority.path, connect_timeout=PATIENCE_S) as client,
    ):
        with pytest.raises(sidelight.Unavailable, match="TLS: "):
            client.info()
        (connection,) = client._core.pool.connections
        there = threading.Event()
        connection.listen(lambda: there.set() if connection.is_ready else None)
        pair.replace(authority.pair())
        assert there.wait(PATIENCE_S)  # the channel reconnects by itself
        assert client.info().models


def test_mutual_tls_accepts_a_client_with_a_certificate(mutual: str, authority: Authority) -> None:
    mine = authority.pair("client.example")
    tls = TLS(ca=authority.path, certificate=mine.certificate, key=mine.key)
    with sidelight.connect(mutual, tls=tls, connect_timeout=PATIENCE_S) as client:
        assert client.attribute(IMAGE).maps.shape == (1, 32, 32)


@pytest.mark.parametrize("whose", ["none", "another authority's", "expired"])
def test_mutual_tls_rejects_a_client_without_a_certificate(
    mutual: str, authority: Authority, other: Authority, whose: str
) -> None:
    mine = {"none": None, "another authority's": other.pair(), "expired": authority.pair(until=-DAY)}[whose]
    tls = TLS(ca=authority.path, certificate=mine and mine.certificate, key=mine and mine.key)
    with (
        sidelight.connect(mutual, tls=tls, connect_timeout=1) as client,
        pytest.raises(sidelight.Unavailable, match=r"TLS\(certificate=…, key=…\)"),
    ):
        client.info()


def test_an_address_that_is_not_loopback_needs_tls_or_the_plaintext_setting(authority: Authority) -> None:
    with (
        pytest.raises(ConfigurationError, match="--tls-certificate and --tls-key, or allow it with --plaintext"),
        sidelight_server.serve(small_cnn(), listen=("0.0.0.0:0",)),
    ):
        pass
    with serving(authority.pair(), host="0.0.0.0") as address:
        there = address.replace("0.0.0.0", "127.0.0.1")
        with sidelight.connect(there, tls=authority.path, connect_timeout=PATIENCE_S) as client:
            assert client.info().models


def test_a_unix_socket_stays_plain(authority: Authority, tmp_path: Path) -> None:
    pair, listen = authority.pair(), f"unix:{tmp_path}/socket"
    settings = {"tls_certificate": pair.certificate, "tls_key": pair.key, "device": "cpu"}
    with sidelight_server.serve(small_cnn(), listen=(listen,), **settings) as address:
        for tls in (None, authority.path):
            with sidelight.connect(address, tls=tls, connect_timeout=PATIENCE_S) as client:
                assert client.info().models


@pytest.mark.parametrize(
    ("tls", "pattern"),
    [
        (TLS(certificate="a.pem"), "one of certificate and key"),
        (5, "tls: got int, expected True"),
        (Path(__file__), "holds no PEM certificate"),
    ],
    ids=["half a pair", "a number", "no PEM"],
)
def test_connect_refuses_invalid_tls_arguments(tls: object, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        sidelight.connect("127.0.0.1:1", tls=tls)


def test_a_file_that_is_not_there_is_refused_by_connect(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sidelight.connect("127.0.0.1:1", tls=tmp_path / "absent")


def n_connections(port: int) -> int:
    return sum(
        each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port
        for each in psutil.Process().net_connections("tcp")
    )


def test_half_open_connections_neither_block_others_nor_remain(address: str, authority: Authority) -> None:
    host, port = address.split(":")
    before = n_connections(int(port))
    with contextlib.ExitStack() as stack:
        for content in (b"", b"\x16\x03\x01\x02", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
            half = stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
            half.sendall(content)
        with sidelight.connect(address, tls=authority.path, connect_timeout=PATIENCE_S) as client:
            assert client.attribute(IMAGE).maps.shape == (1, 32, 32)
    # The server handles each end at once; another handshake shows when it has handled them all.
    tries = iter(range(1000))
    while n_connections(int(port)) > before:
        handshake(address, authority)
        assert next(tries) < 999


# The command line


def test_the_commands_use_tls(spec: ModelSpec, authority: Authority, other: Authority, tmp_path: Path) -> None:
    picture = tmp_path / "gray.png"
    Image.new("RGB", (32, 32), "gray").save(picture)
    mine = authority.pair()

    def run(*arguments: object, ca: Path = authority.path) -> Result:
        access = ("--address", address, "--ca", ca, "--certificate", mine.certificate, "--key", mine.key)
        return CliRunner().invoke(app, [str(each) for each in (*arguments, *access)])

    with serving(authority.pair(), module=spec, tls_client_ca=authority.path) as address:
        for command in (("info",), ("attribute", picture), ("bench", "--duration", "0.3", "--concurrency", "1")):
            result = run(*command)
            assert result.exit_code == 0, result.output
        refused = run("info", ca=other.path)
    assert refused.exit_code == 1
    assert "not signed by an authority" in refused.output
