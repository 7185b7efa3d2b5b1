"""The options of a stream, which both clients take."""

from collections.abc import AsyncIterable, Iterable
from dataclasses import dataclass
from typing import Literal, Self, get_args

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.validation import flag, span, whole
from .._options import AttributeOptions, Headers, Metadata, checked_metadata
from ..exceptions import InvalidArgument, PartialFailure
from ..results.attribution import Attribution
from .progress import Progress, progress_of

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

    @classmethod
    def checked(
        cls,
        options: AttributeOptions,
        batches: Iterable[object] | AsyncIterable[object],
        *,
        ordered: bool,
        on_error: OnError,
        window: int | None,
        hedge_after: float | None,
        allow_model_change: bool,
        keep_images: bool,
        progress: bool,
        metadata: Metadata,
    ) -> Self:
        """Validate a caller's options. Raises `InvalidArgument`."""
        check_on_error(on_error)
        if isinstance(batches, str | bytes):
            raise InvalidArgument(f"batches: got {type(batches).__name__}, expected an iterable of batches")
        if window is not None and whole(window, "window") < 1:
            raise InvalidArgument(f"window: got {window}, expected at least 1 example")
        return cls(
            options.template(),
            timeout_s=options.timeout,
            is_one_row=options.method.is_one_row,
            ordered=ordered,
            on_error=on_error,
            window=window,
            hedge_after_s=None if hedge_after is None else span(hedge_after, "hedge_after"),
            allow_model_change=allow_model_change,
            keep_images=flag(keep_images, "keep_images"),
            progress=progress_of(batches, is_shown=flag(progress, "progress")),
            metadata=checked_metadata(metadata),
        )


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
