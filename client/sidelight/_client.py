"""The client: connects, asks, and reads answers."""

import os
from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import Self

from sidelight.v1 import attribution_pb2 as pb

from ._core import (
    CONNECT_TIMEOUT_S,
    MAX_MESSAGE_BYTES,
    RELOAD_TIMEOUT_S,
    TIMEOUT_S,
    ClientCore,
    OnError,
    check_on_error,
    raise_if_failed,
    stream_template,
    translate_errors,
    unary_request,
)
from ._inputs.batch import Batch, Images, single_batch
from ._inputs.enums import Channels, MapDtype, Score
from ._inputs.images import EncodedBatch
from ._inputs.targets import Choice, Target
from ._inputs.validation import flag
from ._options import (
    FOR_EVER_S,
    AttributeOptions,
    Headers,
    Metadata,
    check_classes,
    checked_metadata,
    options_by_name,
)
from ._streaming.reorder_buffer import ReorderBuffer
from ._streaming.results_queue import End
from ._transport.credentials import TLS, Token
from ._transport.environment import address_or_default, token_or_default
from ._transport.retry_policy import RetryPolicy
from .exceptions import SidelightError
from .methods.baselines import given_array
from .methods.gradient import Gradient
from .methods.method import Method, is_one_row
from .results import attribution
from .results.attribution import Attribution
from .results.server_info import ModelInfo, ServerInfo


def connect(
    address: str | Sequence[str] | None = None,
    *,
    connect_timeout: float = CONNECT_TIMEOUT_S,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    shared_memory: bool | str | os.PathLike[str] = False,
    retry: bool = True,
    tls: bool | str | os.PathLike[str] | TLS | None = None,
    token: Token | None = None,
) -> "Client":
    """Return a client of the server at an address, "host:port" or "unix:/path". It returns at once.

    Without an address it is that of the environment variable SIDELIGHT_ADDRESS; without a token it is the text of
    SIDELIGHT_TOKEN, if that is set. There may be several addresses, in a list or with commas between them, of the same
    model: calls go to each in turn that is there, and streams to all of them. Calls wait up to `connect_timeout`
    seconds for a server that is not there yet, and say so in the log after one.

    `max_message_bytes` bounds each message in both directions, and should be the server's. With `shared_memory` arrays
    and maps go through memory that a server on the same machine shares (Linux, and its operator has to allow it), or
    not at all; a folder's name says where that is, if this process sees it by another name than the server.

    A call that a full server refuses is made again after the delay that it names, and one whose server goes away once
    more, within its own time; without `retry` it fails at once, and so does a stream's batch.

    With `tls` connections over TCP are encrypted, and the server must show a certificate of an authority that is
    trusted: True for those that the system trusts, a path for those of a PEM file, `TLS` for more. `token` is what
    each call brings as a bearer token: its text; a `pathlib.Path` of the file whose first line it is; or a function
    that returns it. The latter two are asked for every call; text that is a file's path is refused. So is a token that
    would travel to another machine without TLS. UNIX sockets need none.

    `InvalidArgument` says what is wrong with any of these, `UnreadableFile` which file cannot be read.
    """
    return Client(
        address_or_default(address),
        connect_timeout=connect_timeout,
        max_message_bytes=max_message_bytes,
        shared_memory=shared_memory,
        retry=retry,
        tls=tls,
        token=token_or_default(token),
    )


class Client:
    """Connections to one server, or to several of the same model. Thread-safe; close it, or use `with`.

    It belongs to the process that made it: in one that was forked from that, calls raise `FailedPrecondition`.

    Every failed call raises a `SidelightError` of the status's own type; a file that cannot be read, `UnreadableFile`.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        connect_timeout: float = CONNECT_TIMEOUT_S,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        shared_memory: bool | str | os.PathLike[str] = False,
        retry: bool = True,
        tls: bool | str | os.PathLike[str] | TLS | None = None,
        token: Token | None = None,
    ) -> None:
        self._core = ClientCore(
            address,
            connect_timeout=connect_timeout,
            max_message_bytes=max_message_bytes,
            shared_memory=shared_memory,
            retry=retry,
            tls=tls,
            token=token,
        )

    @property
    def address(self) -> str:
        """Where the server is; of several, where all of them are."""
        return self._core.pool.addresses

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection. Running calls and streams end with `Cancelled`."""
        self._core.close()

    @options_by_name
    def attribute(
        self,
        images: Images | Batch,
        *,
        model: str | None = None,
        target: Target = None,
        method: Method = Gradient(),  # noqa: B008
        score: Score = "probability",
        channels: Channels = "max_abs",
        probabilities: bool = False,
        map_dtype: MapDtype = "float32",
        served_classes: Sequence[Choice] | None = None,
        timeout: float = TIMEOUT_S,
        on_error: OnError = "raise",
        metadata: Metadata = (),
    ) -> Attribution:
        """Return the maps of one batch.

        `images`: a path, encoded bytes, a PIL image, uint8 pixels [H, W, C] or [N, H, W, C], model-ready floats
        [C, H, W] or [N, C, H, W], or a list of them. `target`: None for the predicted class, a class index, a label, a
        list with one of these for each example, or `TopK`, `Contrast`, `Dense`. `map_dtype` is how the maps travel:
        "float16" and "uint8" are shorter and rounded, "uint8" for maps without negative values alone. `served_classes`
        are the classes, by index or label, that your model server predicted for these examples:
        `predictions[i].is_mismatch` says where another is predicted here. A `Batch` as images has a target, served
        classes and an id of its own. `timeout` is in seconds, and includes waiting for a server, which takes at most
        `connect_timeout` of it. `metadata` are pairs that the call brings, such as a trace's headers. A batch that is
        too large for a message is sent in parts.

        Where some examples failed, `on_error="raise"` raises `PartialFailure`, which carries the answer, and "return"
        returns the answer, whose `failures` are set. A batch that failed whole raises its error.
        """
        check_on_error(on_error)
        options = AttributeOptions(model, target, method, score, channels, probabilities, timeout, map_dtype)
        batch = EncodedBatch(single_batch(images, served_classes))
        template = options.template()
        check_classes(template, batch)
        return raise_if_failed(
            self._explain(template, batch, timeout_s=timeout, metadata=checked_metadata(metadata)), on_error
        )

    @options_by_name
    def stream(
        self,
        batches: Iterable[Images | Batch],
        *,
        model: str | None = None,
        ordered: bool = False,
        target: Target = None,
        method: Method = Gradient(),  # noqa: B008
        score: Score = "probability",
        channels: Channels = "max_abs",
        probabilities: bool = False,
        map_dtype: MapDtype = "float32",
        timeout: float = TIMEOUT_S,
        on_error: OnError = "raise",
        partial: bool = False,
        window: int | None = None,
        allow_model_change: bool = False,
        keep_images: bool = False,
        metadata: Metadata = (),
    ) -> Generator[Attribution]:
        """Yield the maps of many batches as they are ready; `answer.index` is the batch's position in `batches`.

        The options are those of `attribute`, asked of every batch; `timeout` is each batch's own. A `Batch` may have a
        target, served classes and an id of its own; `answer.id` is that id, and a batch whose id an unanswered batch
        has is refused. A `target` of the call with a class for each example is as long as the first batch that has no
        target of its own; a later one may be shorter, and takes the first of them.
        `ordered` yields in the batches' order. `window` bounds the unanswered examples, and is always at least two
        batches (default: twice the server's chunk for methods of one row; two batches for others, whose every example
        fills chunks, and whose timeouts would otherwise run while they wait for each other); nothing of `batches` is
        read beyond it, and it is read in a thread of its own.

        With `partial`, a method that refines yields a batch several times, with `final` unset until the last; a caller
        who is slow gets fewer of these, and with `ordered` only the batch whose turn it is has them.

        A batch too large for a message is sent in parts. Where a server goes away, what it has not answered is sent
        again, to it or to another, until the batch's own time is over; each batch is yielded once. A batch that was
        alone at work when its server died, twice, fails with `ServerDied`. A server that comes back with another model
        ends the stream with `ModelChanged`, unless `allow_model_change` lets it be.

        `overlay` and `save` draw on the images. An answer keeps those that were files, and arrays until the next answer
        is taken, so that a list of answers does not hold every batch in memory; with `keep_images` it keeps both.

        With `on_error="return"` a batch that failed is yielded too, with `error` or `failures` set; with "raise" the
        first failure ends the stream. `close()` on the generator cancels what is unanswered on the servers, and returns
        when the stream's threads have ended.
        """
        options = AttributeOptions(model, target, method, score, channels, probabilities, timeout, map_dtype, partial)
        return self._answers(
            batches,
            stream_template(batches, on_error, options, window=window),
            timeout_s=timeout,
            is_one_row=is_one_row(method),
            ordered=ordered,
            on_error=on_error,
            window=window,
            allow_model_change=allow_model_change,
            keep_images=flag(keep_images, "keep_images"),
            metadata=checked_metadata(metadata),
        )

    def info(self, *, metadata: Metadata = ()) -> ServerInfo:
        """Return the server's version, limits, methods and models; of several servers, the next one's."""
        return self._core.info(metadata=metadata)

    def model(self, name: str | None = None, *, metadata: Metadata = ()) -> ModelInfo:
        """Return one model with its labels and layers; None is the default model."""
        return self._core.model(name, metadata=metadata)

    def reload(
        self, name: str | None = None, *, timeout: float = RELOAD_TIMEOUT_S, metadata: Metadata = ()
    ) -> ModelInfo:
        """Have a model loaded again from its source, and return the version that serves then; None is the default.

        Running requests end on the version that they began on. `PermissionDenied` where the operator does not allow it;
        `FailedPrecondition` says what is wrong with the new version, and the old one goes on serving. Of several
        servers, the next one's: connect to each by itself.
        """
        return self._core.reload(name, timeout=timeout, metadata=metadata)

    def _explain(
        self, template: pb.AttributeRequest, batch: EncodedBatch, *, timeout_s: float, metadata: Headers = ()
    ) -> Attribution:
        """Return the answer to a request for a batch, which is sent in parts where it is too large for one message."""
        policy = RetryPolicy(timeout_s, retry=self._core.retry)
        if not self._core.shared_memory:
            request = unary_request(template, batch)
            if self._core.fits(request, batch, within_s=timeout_s):
                return self._call_unary(request, batch, policy=policy, metadata=metadata)
        (answer,) = self._answers(
            [batch],
            template,
            timeout_s=policy.left_s,
            patience_s=min(self._core.connect_timeout_s, policy.left_s),
            on_error="return",
            metadata=metadata,
        )
        if answer.error is not None:
            raise answer.error
        return answer

    def _call_unary(
        self, request: pb.AttributeRequest, batch: EncodedBatch, *, policy: RetryPolicy, metadata: Headers
    ) -> Attribution:
        while True:
            connection = self._core.pool.ready(min(self._core.connect_timeout_s, policy.left_s))
            try:
                with translate_errors(self._core.max_message_bytes):
                    response = connection.attribution.Attribute(
                        request, timeout=min(policy.left_s, FOR_EVER_S), metadata=metadata
                    )
                return attribution.read(response.result, batch, baseline=given_array(request.method))
            except SidelightError as error:
                if self._core.closed.is_set():
                    raise
                self._core.closed.wait(policy.delay_after(error))

    def _answers(
        self,
        batches: Iterable[Images | Batch | EncodedBatch],
        template: pb.AttributeRequest,
        *,
        timeout_s: float,
        on_error: OnError,
        patience_s: float | None = None,
        is_one_row: bool = False,
        ordered: bool = False,
        window: int | None = None,
        allow_model_change: bool = False,
        keep_images: bool = True,
        metadata: Headers = (),
    ) -> Generator[Attribution]:
        self._core.pool.ready(min(self._core.connect_timeout_s, timeout_s))
        stream = self._core.open_stream(
            iter(batches),
            template,
            facts=self._core.facts(template.model, within_s=timeout_s),
            timeout_s=timeout_s,
            patience_s=self._core.connect_timeout_s if patience_s is None else patience_s,
            is_one_row=is_one_row,
            window=window,
            allow_model_change=allow_model_change,
            metadata=metadata,
        )
        order = ReorderBuffer(ordered=ordered)
        stream.start()
        try:
            while not isinstance(answered := stream.wait(), End):
                for entry, answer in order.admit(*answered):
                    if answer.final:
                        stream.release(entry)
                    answer = raise_if_failed(answer, on_error)
                    yield answer if keep_images else attribution.lent(answer, entry.batch)
            if answered.error is not None:
                raise answered.error
        finally:
            stream.close()
