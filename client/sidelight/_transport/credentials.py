"""Credentials: TLS, and a bearer token in the metadata of each call."""

import collections
import contextlib
import ipaddress
import os
import re
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from ..exceptions import InvalidArgument, UnreadableFile

AUTHORIZATION = "authorization"
TOKEN_VARIABLE = "SIDELIGHT_TOKEN"  # noqa: S105  (it is the name of a variable)
GRPC_ROOTS = "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"  # read by gRPC itself

Token = str | os.PathLike[str] | Callable[[], str]


@dataclass(frozen=True, slots=True)
class TLS:
    """TLS settings of a client. The files are read when the client is created.

    `ca`: a PEM file of trusted authorities. None trusts those of the system, as OpenSSL finds them (SSL_CERT_FILE and
    SSL_CERT_DIR override them); if there are none, those that gRPC ships. `certificate` and `key`: PEM files, for a
    server that requires client certificates. `server_name`: the name in the server's certificate, if it is not the host
    of the address.
    """

    ca: str | os.PathLike[str] | None = None
    certificate: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials. Raises `InvalidArgument` if a file has the wrong content."""
        if (self.certificate is None) != (self.key is None):
            raise InvalidArgument("tls: got one of certificate and key, expected both or none")
        ca, key, certificate = (None if each is None else Path(each) for each in (self.ca, self.key, self.certificate))
        try:
            read = [None if each is None else each.read_bytes() for each in (ca, key, certificate)]
        except OSError as error:
            raise UnreadableFile.of(error, "tls") from None
        read[0] = read[0] or _system_roots()
        # gRPC accepts any bytes here, and then fails to connect.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if ca:
                context.load_verify_locations(ca)
        except ssl.SSLError:
            raise InvalidArgument(f"tls: {ca} holds no PEM certificate of an authority") from None
        try:
            if certificate:
                context.load_cert_chain(certificate, key, password="")
        except ssl.SSLError:
            raise InvalidArgument(
                f"tls: {certificate} and {key} are not a pair of a PEM certificate and its key without a password"
            ) from None
        return grpc.ssl_channel_credentials(*read)


def _system_roots() -> bytes | None:
    """Return the PEM certificates that the system trusts. None leaves the choice to gRPC, which ships public ones."""
    if GRPC_ROOTS in os.environ:
        return None
    paths = ssl.get_default_verify_paths()
    if paths.cafile:
        return Path(paths.cafile).read_bytes() or None
    # OpenSSL's names for them: a hash of the subject and a number.
    files = sorted(Path(paths.capath).glob("*.[0-9]")) if paths.capath else []
    return b"\n".join(each.read_bytes() for each in files if each.is_file()) or None


def token_or_default(token: Token | None) -> Token | None:
    """Return the token, or by default that of the environment, if any."""
    return os.environ.get(TOKEN_VARIABLE) or None if token is None else token


@dataclass(frozen=True, slots=True)
class ChannelSecurity:
    """TLS and token of a client's connections. UNIX sockets never use TLS."""

    tls: TLS | None = None
    token: Token | None = field(default=None, repr=False)

    @classmethod
    def of(cls, tls: "bool | str | os.PathLike[str] | TLS | None", token: Token | None) -> "ChannelSecurity":
        """Validate the arguments of `connect`. Raises `InvalidArgument`."""
        if isinstance(tls, str | os.PathLike):
            tls = TLS(ca=tls)
        elif isinstance(tls, bool):
            tls = TLS() if tls else None
        if not isinstance(tls, TLS | None):
            raise InvalidArgument(
                f"tls: got {type(tls).__name__}, expected True, the path of a CA's file, or sidelight.TLS"
            )
        if not (token is None or callable(token) or isinstance(token, str | os.PathLike)):
            raise InvalidArgument(f"token: got {type(token).__name__}, expected a str, a path or a function")
        if isinstance(token, str) and _is_path(token):
            raise InvalidArgument(
                "token: the text is a file's path; pass pathlib.Path(…) to read the token from the file"
            )
        if not callable(token) and token is not None:
            _text(token)
        return cls(tls, token)

    def is_encrypted(self, address: str) -> bool:
        """Return whether connections to an address use TLS."""
        return self.tls is not None and not address.startswith("unix:")

    def channel(self, address: str, options: Sequence[tuple[str, Any]], *, host: str | None = None) -> grpc.Channel:
        """Return a channel to an address, whose certificate is for `host` if that is given. Checks the token."""
        if self.is_encrypted(address):
            assert self.tls is not None  # noqa: S101
            name = self.tls.server_name or host
            named = [("grpc.ssl_target_name_override", name)] if name else []
            return grpc.secure_channel(address, self.tls.credentials(), options=[*options, *named])
        self.check_token(address)
        return grpc.insecure_channel(address, options=options)

    def check_token(self, address: str) -> None:
        """Raise `InvalidArgument` if a token would leave this machine without TLS."""
        if self.token is not None and not self.is_encrypted(address) and not _is_local(address):
            raise InvalidArgument(
                f"token: {address} is another machine, and without TLS others could read the token; pass tls="
            )

    def authorized(self, channel: grpc.Channel) -> grpc.Channel:
        """Return the channel; if there is a token, one that sends it with every call."""
        return channel if self.token is None else grpc.intercept_channel(channel, _Bearer(self.token))


class _Bearer(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor):
    """Sends a token with each call. A callable is called and a file read each time, so the token may change."""

    def __init__(self, token: Token) -> None:
        self._token = token

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_token(client_call_details), request)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return continuation(self._with_token(client_call_details), request_iterator)

    def _with_token(self, details: Any) -> "_Details":
        metadata = (*(details.metadata or ()), (AUTHORIZATION, f"Bearer {_text(self._token)}"))
        return _Details(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready, details.compression
        )


class _Details(
    collections.namedtuple("_Details", "method timeout metadata credentials wait_for_ready compression"),
    grpc.ClientCallDetails,
):
    """The call details that gRPC expects."""


def _text(token: Token) -> str:
    """Return a token's text. Raises `InvalidArgument`, which does not show it, if no header may contain it."""
    if callable(token):
        text = token()
    elif isinstance(token, str):
        text = token
    else:
        try:
            lines = map(str.strip, Path(token).read_text(encoding="utf-8").splitlines())
            text = next((line for line in lines if line and not line.startswith("#")), "")
        except OSError as error:
            raise UnreadableFile.of(error, "token", token) from None
        except UnicodeDecodeError:
            raise InvalidArgument(f"token: {token} holds no text in UTF-8") from None
    if not isinstance(text, str) or not text or not all("!" <= letter <= "~" for letter in text):
        raise InvalidArgument("token: expected ASCII text without spaces, at least one character")
    return text


def _is_path(text: str) -> bool:
    """Return whether a text is the path of a file, or looks like one: a path was given where the token was meant."""
    with contextlib.suppress(OSError, ValueError):  # too long for a path, or with a null byte
        if Path(text).is_file():
            return True
        if text.startswith("/"):  # base64 may begin like this, too; of a path, the first folder exists
            return len(parts := Path(text).parts) > 2 and Path(*parts[:2]).is_dir()
    return re.match(r"\.{1,2}/|~/", text) is not None or re.fullmatch(r"[\w/-]+\.(txt|token|key|pem)", text) is not None


def _is_local(address: str) -> bool:
    """Return whether an address is on this machine."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
