"""Exceptions: one for each gRPC status code, and subclasses for errors that the client distinguishes.

SidelightError
├── InvalidArgument        an argument or a field of the request is wrong; also a ValueError
│   └── UnreadableFile     a file that the client cannot read; also an OSError
├── NotFound               no such model, label, layer or region
├── FailedPrecondition     the request is valid, but this model cannot serve it
├── OutOfRange             a value is past the valid range
├── AlreadyExists          the item to create already exists
├── Unimplemented          this version of the server does not support the call or option
├── Unauthenticated        the token is missing or invalid
├── PermissionDenied       the caller may not use this call or model
├── ResourceExhausted      a limit of the server is reached: wait `retry_delay_s` before a retry
│   └── MessageTooLarge    a message exceeds the client's or the server's size limit
├── Unavailable            no server can be reached, or it is shutting down
│   └── ServerDied         the server died twice while it processed only this batch: no further retry
├── DeadlineExceeded       the timeout passed before the answer came
├── Cancelled              the call was cancelled
├── Aborted                the call was aborted
│   └── ModelChanged       the model was replaced while a stream was running
├── Internal               the model or the server failed
├── DataLoss               data was lost or corrupted
├── Unknown                the server returned an unknown status
└── PartialFailure         some examples of a batch failed: `answer` has the maps of the others
"""

import errno
from typing import TYPE_CHECKING, ClassVar

import grpc

if TYPE_CHECKING:
    from .results.attribution import Attribution

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "MessageTooLarge",
    "ModelChanged",
    "NotFound",
    "OutOfRange",
    "PartialFailure",
    "PermissionDenied",
    "ResourceExhausted",
    "ServerDied",
    "SidelightError",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "UnreadableFile",
]

RETRY_TRAILER = "retry-after-ms"


class SidelightError(Exception):
    """A failed call or batch.

    `code` is the canonical gRPC status code. `retry_delay_s` is how long to wait before a retry; None if the server
    gave no delay.
    """

    code: ClassVar[int] = 2

    def __init__(self, message: str, *, retry_delay_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_delay_s = retry_delay_s


class Cancelled(SidelightError):
    """The call was cancelled."""

    code = 1


class Unknown(SidelightError):
    """The server returned an unknown status."""

    code = 2


class InvalidArgument(SidelightError, ValueError):
    """An argument or a field of the request is wrong. Both the client and the server check."""

    code = 3


class UnreadableFile(InvalidArgument, OSError):
    """A file that the client cannot read. `filename` and `errno` are set.

    If the file does not exist, the exception is also a `FileNotFoundError`; if it is a folder, an `IsADirectoryError`.
    """

    @classmethod
    def of(cls, error: OSError, field: str, path: object = None) -> "UnreadableFile":
        """Return the exception for a failed read of the file that an argument names."""
        name = path if error.filename is None else error.filename
        kind: type[UnreadableFile] = _OF_ERRNO.get(error.errno or 0, cls)
        unreadable = kind(f"{field}: cannot read {name}: {error.strerror or error}")
        unreadable.errno, unreadable.strerror, unreadable.filename = error.errno, error.strerror, name
        return unreadable

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message,), {name: getattr(self, name) for name in ("errno", "strerror", "filename")}


class _MissingFile(UnreadableFile, FileNotFoundError):
    """The file does not exist."""


class _FolderForFile(UnreadableFile, IsADirectoryError):
    """The path is a folder, not a file."""


_OF_ERRNO = {errno.ENOENT: _MissingFile, errno.EISDIR: _FolderForFile}


class DeadlineExceeded(SidelightError):
    """The timeout passed before the answer came."""

    code = 4


class NotFound(SidelightError):
    """No such model, label, layer or region."""

    code = 5


class AlreadyExists(SidelightError):
    """The item to create already exists."""

    code = 6


class PermissionDenied(SidelightError):
    """The caller may not use this call or model."""

    code = 7


class ResourceExhausted(SidelightError):
    """A limit of the server is reached: requests in flight, or memory."""

    code = 8


class MessageTooLarge(ResourceExhausted):
    """A message exceeds the client's or the server's size limit. The text names the setting that raises it."""


class FailedPrecondition(SidelightError):
    """The request is valid, but this model cannot serve it."""

    code = 9


class Aborted(SidelightError):
    """The call was aborted."""

    code = 10


class OutOfRange(SidelightError):
    """A value is past the valid range."""

    code = 11


class Unimplemented(SidelightError):
    """This version of the server does not support the call or option."""

    code = 12


class Internal(SidelightError):
    """The model or the server failed; the server's log has the cause."""

    code = 13


class Unavailable(SidelightError):
    """No server can be reached, or it is shutting down."""

    code = 14


class ServerDied(Unavailable):
    """The server died twice while it processed only this batch. The batch may be the cause, so it is not sent again."""


class ModelChanged(Aborted):
    """The model was replaced while a stream was running. `allow_model_change=True` permits this."""


class DataLoss(SidelightError):
    """Data was lost or corrupted."""

    code = 15


class Unauthenticated(SidelightError):
    """The token is missing or invalid."""

    code = 16


class PartialFailure(SidelightError):
    """Some examples of a batch failed. `answer.failures` has the reasons, `answer.maps` the maps of the others."""

    code = 3

    def __init__(self, answer: "Attribution") -> None:
        first = answer.failures[0]
        more = f" (and {len(answer.failures) - 1} more)" if len(answer.failures) > 1 else ""
        super().__init__(
            f"{len(answer.failures)} of {len(answer)} examples failed; example {first.example}: {first.message}{more}"
        )
        self.answer = answer

    def __reduce__(self) -> tuple[type["PartialFailure"], tuple["Attribution"]]:
        return type(self), (self.answer,)


_ERRORS = {error.code: error for error in SidelightError.__subclasses__() if error is not PartialFailure}


def public_name(error: SidelightError) -> str:
    """Return the name of an error's type, or of its first base class that is public."""
    return next(each.__name__ for each in type(error).__mro__ if not each.__name__.startswith("_"))


def from_code(code: int, message: str, *, retry_delay_s: float | None = None) -> SidelightError:
    """Return the exception for a canonical status code."""
    if code == ResourceExhausted.code and "max_message_bytes" in message:
        return MessageTooLarge(message)
    return _ERRORS.get(code, Unknown)(message, retry_delay_s=retry_delay_s)


def from_rpc(error: grpc.RpcError, *, max_message_bytes: int) -> SidelightError:
    """Return the exception for a failed call."""
    status: grpc.StatusCode = error.code()
    message = error.details() or status.name
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return _too_large(message, max_message_bytes)
    if status is grpc.StatusCode.UNIMPLEMENTED:
        message = f"{message}: the server does not have this call; is it a Sidelight server, and as new as this client?"
    trailers = error.trailing_metadata() or ()
    delay_s = next((int(each.value) / 1000 for each in trailers if each.key == RETRY_TRAILER), None)
    return from_code(status.value[0], message, retry_delay_s=delay_s)


def _too_large(message: str, max_message_bytes: int) -> MessageTooLarge:
    """Translate gRPC's message: which side rejected the message, and which setting raises its limit."""
    if "CLIENT:" in message:  # not always at the start: "Stream removed" may come first
        return MessageTooLarge(
            f"the answer is larger than this client takes: max_message_bytes of connect() is {max_message_bytes} "
            f"({message})"
        )
    return MessageTooLarge(
        "the request is larger than the server takes: raise --max-message-bytes of sidelight-server, "
        f"or send fewer examples ({message})"
    )
