"""TLS: which clients and servers accept each other, the error messages, and certificates that change during calls."""

import asyncio
import contextlib
import functools
import logging
import os
import queue
import socket
import ssl
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import sidelight
import sidelight_server
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from sidelight import TLS
from sidelight._cli.app import app
from sidelight_server import ConfigurationError, ModelSpec
from sidelight_server.security.tls import Certificates
from typer.testing import CliRunner, Result

from support.certificates import DAY, Authority, Pair
from support.models import small_cnn
from support.models.gate import Gate, Gated
from support.waiting import until_none

PATIENCE_S = 20.0  # far more than anything here takes: who waits it out has found nothing out
IMAGE = np.zeros((1, 3, 32, 32), np.float32)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "authority")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls") / "other")


@contextlib.contextmanager
def serving(pair: Pair, *, module: object = None, host: str = "127.0.0.1", **settings: object) -> Iterator[str]:
    with sidelight_server.serve(
        module or small_cnn(),
        listen=(f"{host}:0",),
        tls_certificate=pair.certificate,
        tls_key=pair.key,
        device="cpu",
        threads=1,
        **settings,
    ) as address:
        yield address


@pytest.fixture(scope="module")
def address(authority: Authority) -> Iterator[str]:
    with serving(authority.pair()) as address:
        yield address


@pytest.fixture(scope="module")
def mutual(authority: Authority) -> Iterator[str]:
    """A server that wants to see a certificate of its callers'."""
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


def test_a_name_that_the_certificate_has_can_be_said(authority: Authority) -> None:
    with serving(authority.pair("sidelight.example")) as address:
        tls = TLS(ca=authority.path, server_name="sidelight.example")
        with sidelight.connect(address, tls=tls, connect_timeout=PATIENCE_S) as client:
            assert client.info().models


@pytest.mark.parametrize("how", ["file", "folder", "gRPC's own"])
def test_whom_the_system_trusts_is_trusted(
    address: str, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path if how == "file" else tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    if how == "folder":  # OpenSSL's own name for it is of no matter here
        (tmp_path / "0a1b2c3d.0").symlink_to(authority.path)
    with sidelight.connect(address, tls=True, connect_timeout=PATIENCE_S) as client:
        if how == "gRPC's own":
            with pytest.raises(sidelight.Unavailable, match="not signed by an authority"):
                client.info()
        else:
            assert client.info().models


def test_the_asynchronous_client_speaks_it_too(address: str, authority: Authority) -> None:
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


def test_a_fault_that_is_mended_is_forgotten(authority: Authority, other: Authority) -> None:
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
        assert there.wait(PATIENCE_S)  # the channel looks again by itself
        assert client.info().models


def test_mutual_tls_lets_in_who_shows_a_certificate(mutual: str, authority: Authority) -> None:
    mine = authority.pair("client.example")
    tls = TLS(ca=authority.path, certificate=mine.certificate, key=mine.key)
    with sidelight.connect(mutual, tls=tls, connect_timeout=PATIENCE_S) as client:
        assert client.attribute(IMAGE).maps.shape == (1, 32, 32)


@pytest.mark.parametrize("whose", ["none", "another authority's", "expired"])
def test_mutual_tls_turns_away_who_does_not(mutual: str, authority: Authority, other: Authority, whose: str) -> None:
    mine = {"none": None, "another authority's": other.pair(), "expired": authority.pair(until=-DAY)}[whose]
    tls = TLS(ca=authority.path, certificate=mine and mine.certificate, key=mine and mine.key)
    with (
        sidelight.connect(mutual, tls=tls, connect_timeout=1) as client,
        pytest.raises(sidelight.Unavailable, match=r"TLS\(certificate=…, key=…\)"),
    ):
        client.info()


def handshake(address: str, authority: Authority) -> bytes:
    """Return the certificate that a port shows."""
    host, port = address.split(":")
    context = ssl.create_default_context(cafile=authority.path)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as encrypted,
    ):
        shown = encrypted.getpeercert(binary_form=True)
        assert shown
        return shown


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())


def test_a_new_certificate_is_shown_and_what_runs_goes_on(
    authority: Authority, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    pair, new = authority.pair(), authority.pair()
    batches: queue.Queue[np.ndarray | None] = queue.Queue()
    with (
        serving(pair, module=Gated(gate)) as address,
        sidelight.connect(address, tls=authority.path, connect_timeout=PATIENCE_S) as client,
        caplog.at_level(logging.INFO, "sidelight"),
    ):
        before = der(pair)
        assert handshake(address, authority) == before
        answers = client.stream(until_none(batches), window=1)
        batches.put(IMAGE)
        assert next(answers).index == 0
        gate.shut()
        batches.put(IMAGE)
        taken = threading.Thread(target=lambda: results.append(next(answers)))
        results: list[sidelight.Attribution] = []
        taken.start()
        assert gate.reached.wait(PATIENCE_S)

        pair.replace(new)
        assert handshake(address, authority) == der(new) != before
        gate.open()
        taken.join(PATIENCE_S)
        assert results[0].index == 1
        batches.put(None)
        assert list(answers) == []
        assert [each for each in caplog.messages if "certificates_read" in each]
        assert not [each for each in caplog.messages if "waiting for a server" in each]


def test_each_address_shows_a_new_certificate(authority: Authority) -> None:
    pair, new = authority.pair(), authority.pair()
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in free]
        for each in free:
            each.close()
        stack.enter_context(
            sidelight_server.serve(
                small_cnn(), listen=addresses, tls_certificate=pair.certificate, tls_key=pair.key, device="cpu"
            )
        )
        assert [handshake(each, authority) for each in addresses] == [der(pair)] * 2
        pair.replace(new)
        assert [handshake(each, authority) for each in addresses] == [der(new)] * 2


@pytest.mark.parametrize("broken", ["no PEM", "no pair", "missing", "empty"])
def test_a_broken_new_pair_leaves_the_old_one_and_says_so_once(
    authority: Authority, broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair, new = authority.pair(), authority.pair()
    with serving(pair) as address, caplog.at_level(logging.INFO, "sidelight"):
        before = handshake(address, authority)
        key = pair.key.read_bytes()
        match broken:
            case "no PEM":
                pair.certificate.write_text("junk")
            case "no pair":
                os.replace(authority.pair().certificate, pair.certificate)
            case "missing":
                pair.certificate.unlink()
            case "empty":
                pair.certificate.write_bytes(b"")
        for _ in range(3):
            assert handshake(address, authority) == before
        (line,) = [each for each in caplog.messages if "certificates_kept" in each]
        assert str(pair.certificate) in line
        assert key.decode().splitlines()[1] not in caplog.text
        pair.replace(new)
        assert handshake(address, authority) == der(new)


def test_files_that_are_not_good_are_reported_as_stale_until_they_are(authority: Authority, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    pair, new, tokens = authority.pair(), authority.pair(), tmp_path / "tokens"
    tokens.write_text("secret")

    def stale() -> dict[str, float]:
        with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=PATIENCE_S) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        (family,) = [each for each in families if each.name == "sidelight_secret_files_stale"]
        return {each.labels["files"]: each.value for each in family.samples}

    with serving(pair, metrics_listen=metrics, tokens=tokens) as address:
        connect = functools.partial(sidelight.connect, address, tls=authority.path, token="secret")
        assert stale() == {"certificates": 0, "tokens": 0}
        pair.certificate.write_text("junk")
        tokens.write_text("two words")
        with connect(connect_timeout=PATIENCE_S) as client:
            client.info()
        assert stale() == {"certificates": 1, "tokens": 1}
        pair.replace(new)
        tokens.write_text("secret")
        with connect(connect_timeout=PATIENCE_S) as client:
            client.info()
        assert stale() == {"certificates": 0, "tokens": 0}


def test_certificates_that_a_server_cannot_start_with_are_refused(authority: Authority, tmp_path: Path) -> None:
    pair, other = authority.pair(), authority.pair()
    junk = tmp_path / "junk"
    junk.write_text("junk")
    wrong = {
        "^tls_certificate: cannot read .*/absent: No such file": {"tls_certificate": tmp_path / "absent"},
        "^tls_key: cannot read .*/absent: No such file": {"tls_key": tmp_path / "absent"},
        "^tls_certificate: .* are not a pair": {"tls_key": other.key},
        "^tls_certificate: .*junk and .* are not a pair": {"tls_certificate": junk},
        "^tls_client_ca: .* holds no PEM certificate": {"tls_client_ca": junk},
        "^tls_certificate: got .* without tls_key": {"tls_key": None},
        "^tls_key: got .* without tls_certificate": {"tls_certificate": None},
        "^tls_client_ca: got .* without tls_certificate": {
            "tls_certificate": None, "tls_key": None, "tls_client_ca": authority.path,
        },
    }  # fmt: skip
    for pattern, settings in wrong.items():
        right = {"tls_certificate": pair.certificate, "tls_key": pair.key}
        with (
            pytest.raises(ConfigurationError, match=pattern),
            sidelight_server.serve(small_cnn(), listen=("127.0.0.1:0",), **right | settings),
        ):
            pass


def test_a_key_with_a_password_is_refused_instead_of_asked_for(authority: Authority, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    pair = authority.pair()
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"password"),
        )
    )
    with pytest.raises(ConfigurationError, match="without a password"):
        Certificates(pair.certificate, locked).credentials()
    with pytest.raises(ValueError, match="without a password"):
        sidelight.connect("127.0.0.1:1", tls=TLS(certificate=pair.certificate, key=locked))


def test_a_key_that_everybody_may_read_is_reported(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    pair = authority.pair()
    Certificates(pair.certificate, pair.key).credentials()
    assert not caplog.messages
    pair.key.chmod(0o644)
    Certificates(pair.certificate, pair.key).credentials()
    (line,) = caplog.messages
    assert f"tls_key: {pair.key} is open to every user" in line


def test_an_address_that_is_not_loopback_needs_tls_or_a_word(authority: Authority) -> None:
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
def test_what_is_no_tls_is_refused_by_connect(tls: object, pattern: str) -> None:
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
    # The server sees each end at once; a handshake of its own tells when it has seen them all.
    tries = iter(range(1000))
    while n_connections(int(port)) > before:
        handshake(address, authority)
        assert next(tries) < 999


# The command line


def test_the_commands_speak_it(spec: ModelSpec, authority: Authority, other: Authority, tmp_path: Path) -> None:
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
