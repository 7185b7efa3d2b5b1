"""The client: `connect` and `Client`, with unary calls and streams."""

import os
from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import Self

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.batch import Batch, Images, single_batch
from .._inputs.enums import Channels, MapDtype, Score
from .._inputs.images import EncodedBatch
from .._inputs.targets import Choice, Target
from .._options import (
    AttributeOptions,
    Headers,
    Metadata,
    check_classes,
    checked_metadata,
    options_by_name,
)
from .._streaming.results_queue import End
from .._transport.credentials import TLS, Token, token_or_default
from .._transport.pool import address_or_default
from .._transport.retry_policy import RetryPolicy
from ..exceptions import SidelightError
from ..methods.baselines import given_array
from ..methods.gradient import Gradient
from ..methods.method import Method
from ..results.attribution import Attribution
from ..results.messages import read_answer
from ..results.server_info import ModelInfo, ServerInfo
from .core import (
    CONNECT_TIMEOUT_S,
    MAX_MESSAGE_BYTES,
    RELOAD_TIMEOUT_S,
    TIMEOUT_S,
    ClientBase,
    translate_errors,
    unary_request,
)
from .delivery import Delivery
from .progress import progress_of
from .stream_options import OnError, StreamOptions, check_batches, check_on_error, raise_if_failed


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
    """Return a client of the server at an address, "host:port" or "unix:/path". It does not wait for the server.

    The defaults of `address` and `token` are the environment variables SIDELIGHT_ADDRESS and SIDELIGHT_TOKEN. Several
    addresses of servers with the same model may be given, as a list or separated by commas. "dns:host:port" means all
    addresses of a DNS name. It is looked up every two seconds: new servers are used, and removed ones get no more
    requests. A call goes to the connected server with the least work, and a stream uses all of them. Calls wait up to
    `connect_timeout` seconds for a server, and log a warning after one second.

    `max_message_bytes` limits each message in both directions, and should equal the server's limit. With
    `shared_memory`, arrays and maps travel in memory shared with a server on the same machine, with no fallback to
    messages; this needs Linux, and the server's operator must allow it. A path instead of True is the shared folder as
    this process sees it, if its path differs from the server's.

    With `retry`, a call that a full server rejects is repeated after the delay that the server names, and a call whose
    server goes away is repeated once, both within the call's timeout. Without it, calls and batches fail at once.

    With `tls`, TCP connections are encrypted, and the server's certificate must be signed by a trusted authority:
    True trusts those of the system, a path those in a PEM file; see `TLS` for more. `token` is the bearer token of
    each call: its text, a `pathlib.Path` of a file with the token on its first line, or a function that returns it.
    The file is read, or the function called, for each call. A text that is the path of a file is rejected, as is a
    token for another machine without TLS. UNIX sockets need no TLS.

    Raises `InvalidArgument` for a wrong argument, and `UnreadableFile` for a file that cannot be read.
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


class Client(ClientBase):
    """Connections to one server, or to several of the same model. Thread-safe; close it, or use `with`.

    It belongs to the process that created it: in a forked child, calls raise `FailedPrecondition`.

    A failed call raises the subclass of `SidelightError` for its status; a file that cannot be read `UnreadableFile`.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Running calls and streams end with `Cancelled`."""
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
        list with one of these for each example, or `TopK`, `Contrast`, `Dense`. `map_dtype` is the type in which the
        maps are sent: "float16" and "uint8" are smaller and rounded, and "uint8" is only for maps without negative
        values. `served_classes` are the classes, by index or label, that your model server predicted for these
        examples: `predictions[i].is_mismatch` is set where this server predicts another. A `Batch` as `images` has its
        own target, served classes and id. `timeout` is in seconds and includes the wait for a server, which is at most
        `connect_timeout`. `metadata` is sent with the call as (key, value) pairs, such as tracing headers. A batch that
        is too large for a message is sent in parts.

        If some examples failed, `on_error="raise"` raises `PartialFailure`, which has the answer, and "return" returns
        the answer with `failures` set. If the whole batch failed, its error is raised in either case.
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
        hedge_after: float | None = None,
        allow_model_change: bool = False,
        keep_images: bool = False,
        progress: bool = False,
        metadata: Metadata = (),
    ) -> Generator[Attribution]:
        """Yield the maps of many batches as they are ready; `answer.index` is the batch's position in `batches`.

        The options are those of `attribute` and apply to each batch, as does `timeout`. A `Batch` may have its own
        target, served classes and id; `answer.id` is that id. A batch with the id of an unanswered batch is rejected.
        If the call's `target` lists one class per example, its length is that of the first batch without a target of
        its own; later batches may be shorter, and use the first classes of the list.

        `ordered` yields the answers in the order of the batches. `window` limits the unanswered examples; two batches
        are always allowed. Its default is twice the server's chunk for methods of one row. For other methods it is two
        batches: one of their examples already fills chunks, and further batches would time out in the queue.
        `batches` is read in a thread of the stream, and not beyond the window.

        With `partial`, a method that refines its maps yields a batch several times, with `final` unset until the last
        time. A slow caller gets fewer of these answers; with `ordered`, only the batch that is due has them.

        A batch that is too large for a message is sent in parts. If a server goes away, its unanswered batches are sent
        again, to it or to another server, until their timeout; each batch is yielded once. If a server dies twice while
        it has only this batch, the batch fails with `ServerDied`. If a server returns with another model, the stream
        ends with `ModelChanged`, unless `allow_model_change` is set.

        With several servers, each batch is sent to the server that is expected to finish it first. With `hedge_after`,
        a batch that has no answer after this many seconds is also sent to a second server. The first answer is yielded,
        and the request on the other server is cancelled.

        `overlay` and `save` need the images. An answer keeps images that were files; it keeps arrays only until the
        next answer is taken, so that a list of answers does not hold every batch in memory. `keep_images` keeps both.

        `progress` shows examples per second, rows, retries and failures: as a bar of rich or tqdm on the error output,
        or, in a notebook, above a live gallery of the newest maps.

        With `on_error="return"`, a failed batch is yielded too, with `error` or `failures` set; with "raise", the first
        failure ends the stream. `close()` of the generator cancels the unanswered batches on the servers, and returns
        when the stream's threads have ended.
        """
        check_batches(batches)
        options = AttributeOptions(model, target, method, score, channels, probabilities, timeout, map_dtype, partial)
        chosen = StreamOptions(
            options.template(),
            timeout_s=timeout,
            is_one_row=method.is_one_row,
            ordered=ordered,
            on_error=on_error,
            window=window,
            hedge_after_s=hedge_after,
            allow_model_change=allow_model_change,
            keep_images=keep_images,
            progress=progress_of(batches, is_shown=progress),
            metadata=checked_metadata(metadata),
        )
        return self._answers(batches, chosen)

    def info(self, *, metadata: Metadata = ()) -> ServerInfo:
        """Return the version, limits, methods and models of a server; with several, of the next one."""
        return self._core.info(metadata=metadata)

    def model(self, name: str | None = None, *, metadata: Metadata = ()) -> ModelInfo:
        """Return one model with its labels and layers; None is the default model."""
        return self._core.model(name, metadata=metadata)

    def reload(
        self, name: str | None = None, *, timeout: float = RELOAD_TIMEOUT_S, metadata: Metadata = ()
    ) -> ModelInfo:
        """Reload a model from its source, and return the version that serves afterwards; None is the default model.

        Running requests finish on the version on which they started. Raises `PermissionDenied` if the operator does not
        allow reloads, and `FailedPrecondition` if the new version cannot be loaded; the old one then continues to
        serve. Only one server is reloaded: if there are several, connect to each separately.
        """
        return self._core.reload(name, timeout=timeout, metadata=metadata)

    def _explain(
        self, template: pb.AttributeRequest, batch: EncodedBatch, *, timeout_s: float, metadata: Headers = ()
    ) -> Attribution:
        """Explain one batch by a unary call, or by a stream if it is too large for one message."""
        policy = RetryPolicy(timeout_s, retry=self._core.retry)
        if not self._core.shared_memory:
            request = unary_request(template, batch)
            if self._core.fits(request, batch, within_s=timeout_s):
                return self._call_unary(request, batch, policy=policy, metadata=metadata)
        options = self._core.options_for_parts(template, policy, metadata)
        (answer,) = self._answers([batch], options)
        if answer.error is not None:
            raise answer.error
        return answer

    def _call_unary(
        self, request: pb.AttributeRequest, batch: EncodedBatch, *, policy: RetryPolicy, metadata: Headers
    ) -> Attribution:
        while True:
            connection = self._core.pool.ready(self._core.wait_s(policy.left_s))
            try:
                with translate_errors(self._core.max_message_bytes), connection.calling(len(batch)):
                    response = connection.attribution.Attribute(request, timeout=policy.left_s, metadata=metadata)
                answer = read_answer(response.result, batch, baseline=given_array(request.method))
                connection.record_load(answer)
                return answer
            except SidelightError as error:
                if self._core.closed.is_set():
                    raise
                self._core.closed.wait(policy.delay_after(error))

    def _answers(
        self, batches: Iterable[Images | Batch | EncodedBatch], options: StreamOptions
    ) -> Generator[Attribution]:
        self._core.pool.ready(self._core.wait_s(options.timeout_s))
        stream = self._core.open_stream(iter(batches), options)
        delivery = Delivery(stream, options)
        stream.start()
        try:
            with delivery.progress:
                while not isinstance(answered := stream.wait(), End):
                    yield from delivery.answers(answered)
            if answered.error is not None:
                raise answered.error
        finally:
            stream.close()
