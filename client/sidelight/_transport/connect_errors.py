"""Connect errors: why a connection failed, from gRPC's description of its last attempt."""

from dataclasses import dataclass

_OTHER_NAME = "the server's certificate is for another name; connect to that name, or pass TLS(server_name=…)"

# Messages of gRPC and BoringSSL, and what to do about them. Waiting fixes none of these.
_FAULTS = (
    ("CERTIFICATE_HAS_EXPIRED", "the server's certificate has expired"),
    ("certificate has expired", "the server's certificate has expired"),
    ("certificate is not yet valid", "the server's certificate is not valid yet; is a clock wrong?"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        'the server\'s certificate is not signed by an authority that this client trusts; name its file, tls="ca.pem"',
    ),
    ("Hostname Verification Check failed", _OTHER_NAME),
    ("is not in peer certificate", _OTHER_NAME),  # of older releases
    ("WRONG_VERSION_NUMBER", "the server there does not use TLS; was it started with --tls-certificate?"),
    ("Tls handshake failed", "the handshake failed"),
    ("Ssl handshake failed", "the handshake failed"),
)
_CLOSED = ("Socket closed", "Connection reset", "recvmsg:", "Broken pipe")


@dataclass(frozen=True, slots=True)
class ConnectError:
    """Why the last attempt to connect failed. `is_lasting`: waiting does not fix it."""

    text: str
    is_lasting: bool


def diagnose(details: str, *, is_encrypted: bool) -> ConnectError:
    """Translate gRPC's details of a failed connection."""
    reason = details.rpartition("last error: ")[2]
    if is_encrypted:
        for words, meaning in _FAULTS:
            if words in reason:
                return ConnectError(f"TLS: {meaning} ({reason})", is_lasting=True)
    if any(words in reason for words in _CLOSED):
        # A server that is shutting down, or a proxy without a backend, does the same: waiting may fix it.
        hint = (
            "it may require a client certificate, TLS(certificate=…, key=…)"
            if is_encrypted
            else "if it uses TLS, pass tls="
        )
        return ConnectError(f"the server ends each connection at once: {hint} ({reason})", is_lasting=False)
    return ConnectError(reason, is_lasting=False)
