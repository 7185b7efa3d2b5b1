"""Connect errors: why no connection comes about, from gRPC's account of its last attempt."""

from dataclasses import dataclass

# What gRPC and BoringSSL say, and what to do about it. None of these mends itself while one waits.
_FAULTS = (
    ("CERTIFICATE_HAS_EXPIRED", "the server's certificate has expired"),
    ("certificate has expired", "the server's certificate has expired"),
    ("certificate is not yet valid", "the server's certificate is not valid yet; is a clock wrong?"),
    (
        "CERTIFICATE_VERIFY_FAILED",
        'the server\'s certificate is not signed by an authority that this client trusts; name its file, tls="ca.pem"',
    ),
    (
        "Hostname Verification Check failed",
        "the server's certificate is for another name; connect by its own, or say it, TLS(server_name=…)",
    ),
    ("WRONG_VERSION_NUMBER", "what answers there speaks no TLS; has the server --tls-certificate?"),
    ("Tls handshake failed", "the handshake failed"),
    ("Ssl handshake failed", "the handshake failed"),
)
_CLOSED = ("Socket closed", "Connection reset", "recvmsg:", "Broken pipe")


@dataclass(frozen=True, slots=True)
class ConnectError:
    """Why the last try to connect came to nothing. `is_lasting` is a fault that waiting does not mend."""

    text: str
    is_lasting: bool


def diagnose(details: str, *, is_encrypted: bool) -> ConnectError:
    """Return what gRPC's words for a failed connection mean."""
    said = details.rpartition("last error: ")[2]
    if is_encrypted:
        for words, meaning in _FAULTS:
            if words in said:
                return ConnectError(f"TLS: {meaning} ({said})", is_lasting=True)
    if any(words in said for words in _CLOSED):
        # So does a server that is just ending, or a proxy without one: it may mend itself.
        hint = (
            "it may want a certificate of this client's, TLS(certificate=…, key=…)"
            if is_encrypted
            else "if it speaks TLS, say tls="
        )
        return ConnectError(f"the server ends each connection at once: {hint} ({said})", is_lasting=False)
    return ConnectError(said, is_lasting=False)
