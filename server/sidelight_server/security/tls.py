"""TLS: the server's certificate, and the authority that must have signed callers' certificates."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from ..config.settings import Settings
from ..errors import ConfigurationError
from .pem import check_authority, check_pair
from .reloadable_files import SecretFiles, read_secret


@dataclass(frozen=True, slots=True)
class Certificates:
    """The files of TLS. With `client_ca`, callers without a certificate that it signed are turned away."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    files: list[SecretFiles[Any]] = field(default_factory=list, compare=False)  # of the credentials that were given

    @classmethod
    def of(cls, settings: Settings) -> "Certificates | None":
        """Return what the operator set; None where that is no TLS. `ConfigurationError` where it is half of it."""
        certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
        if certificate and key:
            return cls(certificate, key, client_ca)
        missing = "tls_key" if certificate else "tls_certificate"
        for name, path in (("tls_certificate", certificate), ("tls_key", key), ("tls_client_ca", client_ca)):
            if path:
                raise ConfigurationError(f"{name}: got {path} without {missing}; TLS wants a certificate and its key")
        return None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one address, which read the files again whenever they have changed.

        gRPC asks before each handshake, in threads of its own. Each address needs its own: a change is told once.
        Running connections stay on what they began with.
        """
        paths = [path for path in (self.certificate, self.key, self.client_ca) if path]
        files = SecretFiles(paths, self._read, name="certificates")
        self.files.append(files)
        return grpc.dynamic_ssl_server_credentials(
            files.content,
            # None says that nothing has changed; the stubs do not know it.
            files.reread,  # type: ignore[arg-type]
            require_client_authentication=self.client_ca is not None,
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """Return what the files hold. gRPC would find out what is wrong with them at the first handshake."""
        certificate = _pem(self.certificate, setting="tls_certificate")
        key = read_secret(self.key, setting="tls_key")
        authority = _pem(self.client_ca, setting="tls_client_ca") if self.client_ca else None
        _check("tls_certificate", lambda: check_pair(self.certificate, self.key))
        if self.client_ca:
            _check("tls_client_ca", functools.partial(check_authority, self.client_ca))
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)


def _pem(path: Path, *, setting: str) -> bytes:
    """Return a file that is no secret."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{setting}: cannot read {path}: {error.strerror}") from None


def _check(setting: str, check: Callable[[], None]) -> None:
    try:
        check()
    except OSError as error:
        raise ConfigurationError(f"{setting}: {error}") from None
