"""The options of an attribution, and the request that carries them for one batch."""

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar, cast

from google.protobuf.duration_pb2 import Duration

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import model_pb2, tensor_pb2

from ._inputs.enums import Channels, MapDtype, Score, enum_number
from ._inputs.images import EncodedBatch
from ._inputs.targets import Target, check_one_for_each, target_message
from ._inputs.validation import flag, span, summary, text
from .exceptions import InvalidArgument
from .methods.method import Method

Metadata = Sequence[tuple[str, str | bytes]]
Headers = tuple[tuple[str, str | bytes], ...]  # metadata that has been checked

_Options = ParamSpec("_Options")
_Answer = TypeVar("_Answer")

_NAME = re.compile(r"[0-9a-z_.-]+")
FOR_EVER_S = 1e9  # about 30 years: sent in place of math.inf, which a Duration cannot hold


def options_by_name(method: Callable[_Options, _Answer]) -> Callable[_Options, _Answer]:
    """Reject a second positional argument with a `TypeError`: options are passed by name."""

    def check(given: tuple[object, ...]) -> None:
        if len(given) > 2:  # the first is self
            raise TypeError(
                f"{method.__name__}() takes only the images by position, got {summary(given[2])} after them: pass "
                'every option by name, as in model="resnet50" or target=3'
            )

    @functools.wraps(method)
    def checked(*given: _Options.args, **options: _Options.kwargs) -> _Answer:
        check(given)
        return method(*given, **options)

    @functools.wraps(method)
    async def awaited(*given: _Options.args, **options: _Options.kwargs) -> object:
        check(given)
        return await cast(Awaitable[object], method(*given, **options))

    # A coroutine function must stay one: frameworks and mocks check with inspect.iscoroutinefunction.
    return cast(Callable[_Options, _Answer], awaited) if inspect.iscoroutinefunction(method) else checked


@dataclass(frozen=True, slots=True)
class AttributeOptions:
    """The options of a call: everything in its requests except the images."""

    model: str | None
    target: Target
    method: Method
    score: Score
    channels: Channels
    probabilities: bool
    timeout: float
    map_dtype: MapDtype = "float32"
    partial: bool = False

    def template(self) -> pb.AttributeRequest:
        """Return the request message without images. `InvalidArgument` for an invalid option."""
        if not isinstance(self.method, Method):
            raise InvalidArgument(f"method: got {self.method!r}, expected a method, such as sidelight.Gradient()")
        return pb.AttributeRequest(
            model=model_name(self.model),
            target=target_message(self.target),
            method=self.method.message(),
            score=enum_number(model_pb2.Score, self.score, Score, "score"),
            channels=enum_number(pb.ChannelReduction, self.channels, Channels, "channels"),
            output=pb.Output(
                map_dtype=enum_number(tensor_pb2.DataType, self.map_dtype, MapDtype, "map_dtype"),
                probabilities=flag(self.probabilities, "probabilities"),
                partial=flag(self.partial, "partial"),
            ),
            timeout=duration(self.timeout),
        )


def check_classes(template: pb.AttributeRequest, batch: EncodedBatch) -> None:
    """Raise `InvalidArgument` if the call's target has one class per example, but not as many as the batch has.

    A batch with its own target was checked when it was encoded.
    """
    if batch.target is None:
        check_one_for_each(template.target, len(batch))


def checked_metadata(metadata: Metadata) -> Headers:
    """Return a call's metadata as a tuple of pairs. `InvalidArgument` for a name or value that gRPC does not allow."""
    pairs = tuple(metadata) if isinstance(metadata, Sequence) and not isinstance(metadata, str | bytes) else None
    if pairs is None or not all(isinstance(each, tuple | list) and len(each) == 2 for each in pairs):
        raise InvalidArgument(
            f"metadata: got {type(metadata).__name__}, expected a sequence of pairs of a name and a value"
        )
    for name, value in pairs:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("grpc-"):
            raise InvalidArgument(
                f"metadata: got the name {name!a}, expected lower case letters, digits, '-', '_' and '.', not grpc-…"
            )
        is_text = isinstance(value, str) and value.isascii() and value.isprintable()
        if not (isinstance(value, bytes) if name.endswith("-bin") else is_text):
            raise InvalidArgument(
                f"metadata: got {type(value).__name__} as the value of {name}, expected printable ASCII text, "
                "or bytes for a name that ends in -bin"
            )
    return tuple((name, value) for name, value in pairs)


def model_name(model: str | None) -> str:
    """Return the model name to send: empty for the server's default model."""
    return "" if model is None else text(model, "model")


def duration(timeout: float) -> Duration:
    """Convert a positive number of seconds to a `Duration`."""
    span_s = min(span(timeout, "timeout"), FOR_EVER_S)
    return Duration(seconds=int(span_s), nanos=int(span_s % 1 * 1e9))
