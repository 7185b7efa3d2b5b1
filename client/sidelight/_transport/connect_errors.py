"""Connect errors: why a connection failed, from gRPC's description of its last attempt."""

from dataclasses import dataclass

_OTHER_NAME = "the server's certificate is for another name; connect by its own, or say it, TLS(server_name=…)"

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
    ("WRONG_VERSION_NUMBER", "what answers there speaks no TLS; has the server --tls-certificate?"),
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
    said = details.rpartition("last error: ")[2]
    if is_encrypted:
        for words, meaning in _FAULTS:
            if words in said:
                return ConnectError(f"TLS: {meaning} ({said})", is_lasting=True)
    if any(words in said for words in _CLOSED):
        # A server that is shutting down, or a proxy without a backend, does the same: waiting may fix it.
        hint = (
            "it may want a certificate of this client's, TLS(certificate=…, key=…)"
            if is_encrypted
            else "if it speaks TLS, say tls="
        )
        return ConnectError(f"the server ends each connection at once: {hint} ({said})", is_lasting=False)
    return ConnectError(said, is_lasting=False)
