"""TLS: the server's certificate and key, and the authority for client certificates."""

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
    """The TLS files. With `client_ca`, clients must have a certificate signed by it."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    files: list[SecretFiles[Any]] = field(default_factory=list, compare=False)  # one for each `credentials` call

    @classmethod
    def of(cls, settings: Settings) -> "Certificates | None":
        """Return the files that the settings name; None without TLS. Raises `ConfigurationError` if one is missing."""
        certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
        if certificate and key:
            return cls(certificate, key, client_ca)
        missing = "tls_key" if certificate else "tls_certificate"
        for name, path in (("tls_certificate", certificate), ("tls_key", key), ("tls_client_ca", client_ca)):
            if path:
                raise ConfigurationError(f"{name}: got {path} without {missing}; TLS needs a certificate and its key")
        return None

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for one address that reload the files when they change.

        gRPC calls the reload function before each handshake, in its own threads. Each address needs its own
        credentials, because the function returns a change only once. Open connections keep their certificate.
        """
        paths = [path for path in (self.certificate, self.key, self.client_ca) if path]
        files = SecretFiles(paths, self._read, name="certificates")
        self.files.append(files)
        return grpc.dynamic_ssl_server_credentials(
            files.content,
            # None means unchanged, which the type stubs do not allow.
            files.reread,  # type: ignore[arg-type]
            require_client_authentication=self.client_ca is not None,
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        """Read and check the files: gRPC would notice invalid ones only at the first handshake."""
        certificate = _pem(self.certificate, setting="tls_certificate")
        key = read_secret(self.key, setting="tls_key")
        authority = _pem(self.client_ca, setting="tls_client_ca") if self.client_ca else None
        _check("tls_certificate", lambda: check_pair(self.certificate, self.key))
        if self.client_ca:
            _check("tls_client_ca", functools.partial(check_authority, self.client_ca))
        return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=authority)


def _pem(path: Path, *, setting: str) -> bytes:
    """Return the bytes of a file that is not secret."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{setting}: cannot read {path}: {error.strerror}") from None


def _check(setting: str, check: Callable[[], None]) -> None:
    try:
        check()
    except OSError as error:
        raise ConfigurationError(f"{setting}: {error}") from None
