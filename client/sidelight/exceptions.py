"""The exceptions: one for each gRPC status, and a few of the client's own.

SidelightError
├── InvalidArgument        an argument or a field of the request is wrong; also a ValueError
│   └── UnreadableFile     a file that the client cannot read; also an OSError
├── NotFound               no such model, label, layer or region
├── FailedPrecondition     right in itself, but not for this model
├── OutOfRange
├── AlreadyExists
├── Unimplemented          not served by this version of the server
├── Unauthenticated        no token, or a wrong one
├── PermissionDenied       not for this caller
├── ResourceExhausted      over the server's permits or memory: `retry_delay_s` says when to ask again
│   └── MessageTooLarge    a message over the limit of one side
├── Unavailable            no server answers, or it is going away
│   └── ServerDied         a batch was alone with two servers that died: it is not sent a third time
├── DeadlineExceeded       the batch's time ran out
├── Cancelled
├── Aborted
│   └── ModelChanged       a stream's model is not the one it began with
├── Internal               the model or the server failed
├── DataLoss
├── Unknown
└── PartialFailure         some examples of a batch failed: `answer` holds the others
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

    `code` is the canonical gRPC status code; `retry_delay_s` how long to wait before asking again, None if that is of
    no use or the server did not say.
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
    """A failure without a status of its own."""

    code = 2


class InvalidArgument(SidelightError, ValueError):
    """An argument or a field of the request is wrong; the client itself raises it for what it cannot send."""

    code = 3


class UnreadableFile(InvalidArgument, OSError):
    """A file that the client cannot read. `filename` and `errno` are set; of one that is not there, or that is a
    folder, it is also a `FileNotFoundError` or an `IsADirectoryError`.
    """

    @classmethod
    def of(cls, error: OSError, field: str, path: object = None) -> "UnreadableFile":
        """Return the exception for a failed read of what a field names."""
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
    """A file that is not there."""


class _FolderForFile(UnreadableFile, IsADirectoryError):
    """A folder where a file was expected."""


_OF_ERRNO = {errno.ENOENT: _MissingFile, errno.EISDIR: _FolderForFile}


class DeadlineExceeded(SidelightError):
    """The batch's time ran out."""

    code = 4


class NotFound(SidelightError):
    """No such model, label, layer or region."""

    code = 5


class AlreadyExists(SidelightError):
    """What was to be made is there already."""

    code = 6


class PermissionDenied(SidelightError):
    """Not for this caller."""

    code = 7


class ResourceExhausted(SidelightError):
    """Over the server's permits or memory."""

    code = 8


class MessageTooLarge(ResourceExhausted):
    """A message over the limit of one side: the text names the side, its limit and the setting."""


class FailedPrecondition(SidelightError):
    """Right in itself, but not for this model."""

    code = 9


class Aborted(SidelightError):
    """The call was aborted."""

    code = 10


class OutOfRange(SidelightError):
    """Past the valid range."""

    code = 11


class Unimplemented(SidelightError):
    """Not served by this version of the server."""

    code = 12


class Internal(SidelightError):
    """The model or the server failed; the server's log has the cause."""

    code = 13


class Unavailable(SidelightError):
    """No server answers, or it is going away."""

    code = 14


class ServerDied(Unavailable):
    """A batch was alone at work when its server died, twice: it is not sent again, for it may be the cause."""


class ModelChanged(Aborted):
    """The model that answers is not the one that a stream began with. `allow_model_change=True` lets it be."""


class DataLoss(SidelightError):
    """Data was lost."""

    code = 15


class Unauthenticated(SidelightError):
    """No token, or a wrong one."""

    code = 16


class PartialFailure(SidelightError):
    """Some examples of a batch failed. `answer.failures` says which and why; `answer` holds the others' maps."""

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


_ERRORS: dict[int, type[SidelightError]] = {
    error.code: error
    for error in (
        Cancelled, Unknown, InvalidArgument, DeadlineExceeded, NotFound, AlreadyExists, PermissionDenied,
        ResourceExhausted, FailedPrecondition, Aborted, OutOfRange, Unimplemented, Internal, Unavailable, DataLoss,
        Unauthenticated,
    )
}  # fmt: skip


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
    return from_code(status.value[0], message, retry_delay_s=_retry_delay_s(error))


def _too_large(message: str, max_message_bytes: int) -> MessageTooLarge:
    """Say in our words what gRPC says: which side refused, and which setting raises its limit."""
    if "CLIENT:" in message:  # it may stand behind "Stream removed"
        return MessageTooLarge(
            f"the answer is larger than this client takes: max_message_bytes of connect() is {max_message_bytes} "
            f"({message})"
        )
    return MessageTooLarge(
        "the request is larger than the server takes: raise --max-message-bytes of sidelight-server, "
        f"or send fewer examples ({message})"
    )


def _retry_delay_s(error: grpc.RpcError) -> float | None:
    trailers = error.trailing_metadata() or ()
    return next((int(each.value) / 1000 for each in trailers if each.key == RETRY_TRAILER), None)
