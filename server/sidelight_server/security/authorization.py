"""Authorization: checks bearer tokens before a call's first message is read."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from ..config.settings import Settings
from ..errors import ConfigurationError, PermissionDenied, SidelightError, Unauthenticated
from .reloadable_files import SecretFiles, read_secret

# Calls that need no token: health probes have none, and the answer is only "serving" or "not serving".
INFERENCE_PROBES = frozenset(
    f"/inference.GRPCInferenceService/{name}" for name in ("ServerLive", "ServerReady", "ModelReady")
)
OPEN = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"}) | INFERENCE_PROBES
ADMIN = frozenset({"/sidelight.v1.ModelService/ReloadModel"})

_SCHEME = "bearer "

Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]


class Tokens:
    """The bearer tokens of a file, one per line. Several are valid at once, so that tokens can be rotated.

    Only digests are kept. Each check compares all of them in constant time, so that its duration reveals nothing.
    """

    def __init__(self, path: Path, *, setting: str) -> None:
        self._path = path
        self._setting = setting
        self.files = SecretFiles([path], self._read, name=setting)

    def __contains__(self, token: str) -> bool:
        digest = _digest(token.encode())
        found = False
        for known in self.files.content:
            found |= hmac.compare_digest(known, digest)
        return found

    def _read(self) -> tuple[bytes, ...]:
        lines = read_secret(self._path, setting=self._setting).splitlines()
        tokens: list[bytes] = []
        for number, line in enumerate(lines, start=1):
            token = line.strip()
            if not token or token.startswith(b"#"):
                continue
            if not all(0x21 <= byte <= 0x7E for byte in token):
                raise ConfigurationError(
                    f"{self._setting}: {self._path}, line {number}: expected one token, of ASCII without spaces"
                )
            tokens.append(_digest(token))
        if not tokens:
            raise ConfigurationError(f"{self._setting}: {self._path} holds no token")
        return tuple(tokens)


class Authorization(grpc.aio.ServerInterceptor):
    """Rejects calls without a valid token. Calls for which no token file is set are not checked."""

    def __init__(self, settings: Settings, refuse: "Callable[[SidelightError], Handler]") -> None:
        """Read the token files. Raises `ConfigurationError` if that fails.

        `refuse` makes the handler that ends a call with an error before its message is read.
        """
        self._refuse = refuse
        self._users = Tokens(settings.tokens, setting="tokens") if settings.tokens else None
        self._admins = Tokens(settings.admin_tokens, setting="admin_tokens") if settings.admin_tokens else None

    @property
    def files(self) -> list[SecretFiles[Any]]:
        return [each.files for each in (self._users, self._admins) if each]

    async def intercept_service(
        self,
        continuation: "Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]]",
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "Handler | None":
        """Return the call's handler, or one that rejects the call without reading its message."""
        if refusal := self._refusal(handler_call_details):
            return self._refuse(refusal)
        return await continuation(handler_call_details)

    def _refusal(self, details: grpc.HandlerCallDetails) -> SidelightError | None:
        is_admin_call = details.method in ADMIN
        if details.method in OPEN or not (self._users or (self._admins and is_admin_call)):
            return None
        token = _token(details.invocation_metadata)
        if token is None:
            return Unauthenticated('authorization: missing, expected "Bearer" and a token')
        is_admin = self._admins is not None and token in self._admins
        is_user = self._users is not None and token in self._users
        if is_admin or (is_user and not is_admin_call):
            return None
        if is_user:
            return PermissionDenied("authorization: this call needs an operator's token (admin_tokens)")
        return Unauthenticated("authorization: unknown token")


class Callers:
    """Identifies the caller for fair sharing: by token, else by client certificate, else by connection.

    Only verified credentials count: a token if the server requires tokens, a certificate if the server has a client CA.
    Callers over UNIX sockets without either count as one. Not by host, because all calls through a sidecar proxy have
    the same host.
    """

    def __init__(self, settings: Settings) -> None:
        self._by_token = settings.tokens is not None
        self._by_certificate = settings.tls_client_ca is not None

    def of(self, context: Context) -> str:
        """Return the caller of a call, as a string."""
        if self._by_token and (token := _token(context.invocation_metadata())):
            return "token:" + _digest(token.encode()).hex()
        if self._by_certificate and (subject := context.auth_context().get("x509_subject")):
            return "certificate:" + b",".join(subject).decode(errors="replace")
        return str(context.peer())


def _token(metadata: Iterable[tuple[str, Any]] | None) -> str | None:
    """Return the bearer token of a call; None if it has none or several."""
    headers = [value for key, value in metadata or () if key == "authorization"]
    if len(headers) != 1 or not isinstance(headers[0], str) or not headers[0].lower().startswith(_SCHEME):
        return None
    return headers[0][len(_SCHEME) :].strip() or None


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
