"""The exception tree. Each `SidelightError` has the status code that a caller gets.

    SidelightError
    ├── InvalidArgument      a field of the request is invalid
    ├── Unauthenticated      no token, or an unknown one
    ├── PermissionDenied     a call for operators only, or a region that the server's user may not open
    ├── NotFound             an unknown model, label, layer or region
    ├── FailedPrecondition   a valid request that this model or this server's configuration cannot serve
    │   └── OutputsError     the model's return value cannot be read as outputs
    ├── Unimplemented        in the schema, but not served by this version
    ├── ResourceExhausted    over the permits, the memory or the message limit
    ├── Unavailable          the server is shutting down, or its device has failed
    ├── DataLoss             a region's file is shorter than registered
    ├── Cancelled            the caller cancelled the batch
    ├── DeadlineExceeded     the batch's timeout passed
    └── Internal             the model or the server failed

    ConfigurationError       a setting or a model that the server cannot start with; never sent to a caller

`Status` has the canonical codes, so that only the RPC layer imports grpc.
"""

import difflib
import enum
from collections.abc import Iterable
from typing import ClassVar

# A message may quote a caller's input. gRPC drops a status message if the trailing metadata exceed 8 KiB, in which one
# character may take 12 bytes.
MAX_MESSAGE = 500
MANY_NAMES = 2000  # the most names that an unknown name is compared with


class Status(enum.IntEnum):
    """The canonical status codes, as gRPC has them."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class SidelightError(Exception):
    """A failure with a canonical status code, and a retry delay if a retry may succeed."""

    code: ClassVar[Status] = Status.UNKNOWN

    def __init__(self, message: str, *, retry_delay_s: float | None = None) -> None:
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + "…"
        super().__init__(message)
        self.message = message
        self.retry_delay_s = retry_delay_s


class Cancelled(SidelightError):
    """The caller cancelled the batch or disconnected."""

    code = Status.CANCELLED


class InvalidArgument(SidelightError):
    """A field of the request is invalid, whatever the server's state."""

    code = Status.INVALID_ARGUMENT


class DeadlineExceeded(SidelightError):
    """The batch's timeout passed before its answer was ready."""

    code = Status.DEADLINE_EXCEEDED


class NotFound(SidelightError):
    """A model, label, layer or region in the request is unknown."""

    code = Status.NOT_FOUND


class PermissionDenied(SidelightError):
    """A call for operators only, or a file that the server's user may not open."""

    code = Status.PERMISSION_DENIED


class ResourceExhausted(SidelightError):
    """Over the permits, the memory or the message limit."""

    code = Status.RESOURCE_EXHAUSTED


class FailedPrecondition(SidelightError):
    """The request is valid, but this model or this server's configuration cannot serve it."""

    code = Status.FAILED_PRECONDITION


class OutputsError(FailedPrecondition):
    """The model's return value cannot be read as outputs. The message has its types, names and shapes."""


class Unimplemented(SidelightError):
    """In the schema, but not served by this version."""

    code = Status.UNIMPLEMENTED


class Internal(SidelightError):
    """The model or the server failed. The message holds no details of the exception: the log does."""

    code = Status.INTERNAL


class Unavailable(SidelightError):
    """The server is shutting down, or its device has failed."""

    code = Status.UNAVAILABLE


class DataLoss(SidelightError):
    """A shared memory region's file is shorter than registered."""

    code = Status.DATA_LOSS


class Unauthenticated(SidelightError):
    """A call without a token, or with an unknown one."""

    code = Status.UNAUTHENTICATED


class ConfigurationError(Exception):
    """A setting, a file or a model that the server cannot start with. One line: setting, file, cause."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the part of a message that suggests names similar to an unknown one, or lists some known names."""
    names = list(known)
    # Comparing takes 10 µs per name: of very many, compare only those with the same first letters.
    alike = names if len(names) <= MANY_NAMES else [each for each in names if each[:2] == name[:2]]
    close = difflib.get_close_matches(name[:MAX_MESSAGE], alike[:MANY_NAMES], n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(f'"{each}"' for each in close) + "?"
    if not names:
        return "there are none"
    return "known: " + ", ".join(f'"{each}"' for each in names[:8]) + (", …" if len(names) > 8 else "")
