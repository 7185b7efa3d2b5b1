"""The options of a stream, which both clients take."""

from dataclasses import dataclass
from typing import Literal, get_args

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.validation import flag, span, whole
from .._options import Headers
from ..exceptions import InvalidArgument, PartialFailure
from ..results.attribution import Attribution
from .progress import Progress

OnError = Literal["raise", "return"]


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How a stream sends its batches and yields its answers. The defaults are those for one batch that is too large."""

    template: pb.AttributeRequest  # the request of each batch, without its images
    timeout_s: float
    server_wait_s: float | None = None  # how long to wait for a server; None: the client's connect timeout
    is_one_row: bool = False  # whether the method takes one row for each example
    ordered: bool = False
    on_error: OnError = "return"
    window: int | None = None
    hedge_after_s: float | None = None
    allow_model_change: bool = False
    keep_images: bool = True
    progress: Progress | None = None
    metadata: Headers = ()

    def __post_init__(self) -> None:
        """Validate what the caller gave. Raises `InvalidArgument`."""
        check_on_error(self.on_error)
        if self.window is not None and whole(self.window, "window") < 1:
            raise InvalidArgument(f"window: got {self.window}, expected at least 1 example")
        if self.hedge_after_s is not None:
            span(self.hedge_after_s, "hedge_after")
        flag(self.keep_images, "keep_images")


def raise_if_failed(answer: Attribution, on_error: OnError) -> Attribution:
    """Return an answer; with `on_error="raise"`, raise its error, or `PartialFailure` for failures of a final one."""
    if on_error == "raise":
        if answer.error is not None:
            raise answer.error
        if answer.final and answer.failures:
            raise PartialFailure(answer)
    return answer


def check_on_error(on_error: str) -> None:
    if on_error not in get_args(OnError):
        raise InvalidArgument(f"on_error: got {on_error!r}, expected one of {', '.join(get_args(OnError))}")


def check_batches(batches: object) -> None:
    """Raise `InvalidArgument` for one picture: a path and bytes are iterable, too."""
    if isinstance(batches, str | bytes):
        raise InvalidArgument(f"batches: got {type(batches).__name__}, expected an iterable of batches")
