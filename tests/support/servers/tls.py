"""Servers with TLS."""

import contextlib
import socket
import ssl
from collections.abc import Iterator

import numpy as np
import sidelight_server

from support.certificates import Authority, Pair
from support.models import small_cnn

PATIENCE_S = 20.0  # far more than any test here takes: waiting this long is a failure
IMAGE = np.zeros((1, 3, 32, 32), np.float32)


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
