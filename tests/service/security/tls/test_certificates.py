"""Certificates of a server: those that change while it runs, and those that are refused."""

import contextlib
import functools
import logging
import os
import queue
import socket
import ssl
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
from prometheus_client.parser import text_string_to_metric_families
from sidelight import TLS
from sidelight_server import ConfigurationError
from sidelight_server.security.tls import Certificates

from support.certificates import Authority, Pair
from support.models import small_cnn
from support.models.gate import Gate, Gated
from support.servers.tls import IMAGE, PATIENCE_S, handshake, serving
from support.waiting import until_none


def der(pair: Pair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())


def test_a_new_certificate_is_presented_and_running_calls_continue(
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


def test_every_address_presents_a_new_certificate(authority: Authority) -> None:
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
def test_a_broken_new_certificate_leaves_the_old_one_in_use_and_is_logged_once(
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


def test_a_key_file_readable_by_all_users_is_reported(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    pair = authority.pair()
    Certificates(pair.certificate, pair.key).credentials()
    assert not caplog.messages
    pair.key.chmod(0o644)
    Certificates(pair.certificate, pair.key).credentials()
    (line,) = caplog.messages
    assert f"tls_key: {pair.key} is open to every user" in line
