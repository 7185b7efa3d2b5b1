"""The exceptions, each with the status code that a caller gets.

    SidelightError
    ├── InvalidArgument      a field of the request is wrong
    ├── Unauthenticated      no token, or none of this server's
    ├── PermissionDenied     a call of the operator's alone, or a region that the server's user may not open
    ├── NotFound             a model, label, layer or region that is not there
    ├── FailedPrecondition   right in itself, but not for this model, or not as the operator set this server
    │   └── OutputsError     the model returned what cannot be read as outputs
    ├── Unimplemented        in the schema, not served by this version
    ├── ResourceExhausted    over the permits, the memory or the message limit
    ├── Unavailable          the server is going away
    ├── DataLoss             a region is shorter than was said, or was cut short
    ├── Cancelled            the caller took the batch back
    ├── DeadlineExceeded     the batch's time ran out
    └── Internal             the model or the server failed

    ConfigurationError       a setting or a model that the server cannot start with; never sent to a caller

No module but the faces knows grpc, so the codes are the canonical numbers.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar

# A message may quote what a caller sent. In a call's trailers it must stay within 8 KiB, or gRPC hides it; there a
# character may take 12 bytes.
MAX_MESSAGE = 500
MANY_NAMES = 2000  # of which some are compared with a name that there is not


class SidelightError(Exception):
    """A failure with a canonical status code, and where asking again is of use, how long to wait before."""

    code: ClassVar[int] = 2

    def __init__(self, message: str, *, retry_delay_s: float | None = None) -> None:
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + "…"
        super().__init__(message)
        self.message = message
        self.retry_delay_s = retry_delay_s


class Cancelled(SidelightError):
    """The caller took the batch back."""

    code = 1


class InvalidArgument(SidelightError):
    """A field of the request is wrong, whatever the server's state."""

    code = 3


class DeadlineExceeded(SidelightError):
    """The batch's time ran out before its answer was ready."""

    code = 4


class NotFound(SidelightError):
    """A name that the request uses is not there."""

    code = 5


class PermissionDenied(SidelightError):
    """A call that is the operator's alone, or a file that the server's user may not open."""

    code = 7


class ResourceExhausted(SidelightError):
    """Over the permits, the memory or the message limit."""

    code = 8


class FailedPrecondition(SidelightError):
    """Right in itself, but not for this model, or not as the operator set this server."""

    code = 9


class OutputsError(FailedPrecondition):
    """A model returned what cannot be read as outputs. The message says what that was: types, names and shapes."""


class Unimplemented(SidelightError):
    """In the schema, but not served by this version."""

    code = 12


class Internal(SidelightError):
    """The model or the server failed. The message holds no details of the exception: the log does."""

    code = 13


class Unavailable(SidelightError):
    """The server is going away."""

    code = 14


class DataLoss(SidelightError):
    """Shared memory does not hold what it was said to hold: its file was cut short."""

    code = 15


class Unauthenticated(SidelightError):
    """A call without a token, or with one that is none of this server's."""

    code = 16


class ConfigurationError(Exception):
    """A setting, a file or a model that the server cannot start with. One line: setting, file, cause."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return words that suggest the names nearest to an unknown one, or list a few when none is near."""
    names = list(known)
    # Comparing takes 10 µs a name: of very many, those that begin alike.
    alike = names if len(names) <= MANY_NAMES else [each for each in names if each[:2] == name[:2]]
    close = difflib.get_close_matches(name[:MAX_MESSAGE], alike[:MANY_NAMES], n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f'"{each}"' for each in close) + "?"
    if not names:
        return "there are none"
    return "known: " + ", ".join(f'"{each}"' for each in names[:8]) + (", …" if len(names) > 8 else "")
