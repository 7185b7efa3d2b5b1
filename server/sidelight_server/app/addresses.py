"""Listening addresses, "host:port" or "unix:/path": checks and binds them."""

import ipaddress
import os
import socket
from pathlib import Path

import grpc

from ..errors import ConfigurationError
from ..security.tls import Certificates


def bind(
    server: grpc.aio.Server,
    address: str,
    *,
    plaintext: bool,
    certificates: Certificates | None = None,
    socket_mode: str | None = None,
) -> str:
    """Bind a server to an address; return the address, with the chosen port if it was 0.

    With `certificates` a port uses TLS; a UNIX socket never does, and gets `socket_mode`. Raises `ConfigurationError`
    if the address cannot be bound, or if it is not loopback and has neither certificates nor `plaintext`.
    """
    try:
        if address.startswith("unix:"):
            _bind_socket(server, Path(address.removeprefix("unix:")), mode=socket_mode)
            return address
        _check_host(address, plaintext=plaintext or certificates is not None)
        if certificates:
            port = server.add_secure_port(address, certificates.credentials())
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigurationError(f"listen: cannot bind {address}: {error}") from error
    return f"{address.rpartition(':')[0]}:{port}"


def _bind_socket(server: grpc.aio.Server, path: Path, *, mode: str | None) -> None:
    _clear_socket(path)
    if mode is None:
        server.add_insecure_port(f"unix:{path}")
        return
    # Set by umask, not by a chmod afterwards: clients could connect in between.
    before = os.umask(0o777 & ~int(mode, 8))
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(before)


def _check_host(address: str, *, plaintext: bool) -> None:
    host, port = host_and_port(address, expected='"host:port" or "unix:/path"')
    if not plaintext and not is_loopback(host):
        raise ConfigurationError(
            f"listen: {address} is not loopback, and nothing would be encrypted; give it --tls-certificate and "
            "--tls-key, or allow it with --plaintext"
        )
    # gRPC only prints the cause of a failed bind and raises without it, so try the bind first.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except (OSError, OverflowError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigurationError(f"listen: cannot bind {address}: {cause}") from error


def host_and_port(address: str, *, setting: str = "listen", expected: str = '"host:port"') -> tuple[str, int]:
    """Split an address into host, without IPv6 brackets, and port. Raises `ConfigurationError`."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigurationError(f'{setting}: got "{address}", expected {expected}')
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _clear_socket(path: Path) -> None:
    """Remove the socket file of a killed server. Raises `ConfigurationError` if it is in use, or not a socket."""
    if not path.parent.is_dir():
        raise ConfigurationError(f"listen: cannot bind unix:{path}: there is no folder {path.parent}")
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigurationError(f"listen: {path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:  # no permission to connect, so none to remove it
            raise ConfigurationError(f"listen: cannot check whether a server uses {path}: {error.strerror}") from error
    raise ConfigurationError(f"listen: another server answers on {path}")
