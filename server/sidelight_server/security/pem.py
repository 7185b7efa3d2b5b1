"""Checks PEM files before gRPC gets them: gRPC would fail at the first handshake, or abort the process.

Standard library only, because the health probe imports it and must start quickly.
"""

import ssl
from pathlib import Path


def check_pair(certificate: Path, key: Path) -> None:
    """Raise `OSError` if the files cannot be read or are not a certificate and its key."""
    try:
        # Without this password, OpenSSL would prompt for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        what = "not a pair of a PEM certificate and its key without a password"
        raise OSError(f"{certificate} and {key} are {what} ({_reason(error)})") from None


def check_authority(path: Path) -> None:
    """Raise `OSError` if the file cannot be read or holds no certificate."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except ssl.SSLError as error:
        raise OSError(f"{path} holds no PEM certificate ({_reason(error)})") from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "unreadable").lower().replace("_", " ")
