"""The asyncio client. It shares connections, streams and retries with `Client`, and never blocks the event loop."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from types import TracebackType
from typing import Self

from sidelight.v1 import attribution_pb2 as pb

from .._inputs.batch import Batch, Images, single_batch
from .._inputs.enums import Channels, MapDtype, Score
from .._inputs.images import EncodedBatch
from .._inputs.targets import Choice, Target
from .._inputs.validation import span
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
from .event_loop import CallersBatches, awaited, from_thread, ready
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
) -> "AsyncClient":
    """Return an asyncio client of one or several servers. The arguments are those of `sidelight.connect`."""
    return AsyncClient(
        address_or_default(address),
        connect_timeout=connect_timeout,
        max_message_bytes=max_message_bytes,
        shared_memory=shared_memory,
        retry=retry,
        tls=tls,
        token=token_or_default(token),
    )


class AsyncClient(ClientBase):
    """A `Client` whose calls are awaited. Close it, or use `async with`.

    Tasks of one or several event loops may share it. Cancelling a task also cancels its call or stream on the server.
    """

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. Running calls and streams end with `Cancelled`."""
        await asyncio.to_thread(self._core.close)

    @options_by_name
    async def attribute(
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
        timeout: float = TIMEOUT_S,  # noqa: ASYNC109  (the server enforces it)
        on_error: OnError = "raise",
        metadata: Metadata = (),
    ) -> Attribution:
        """Return the maps of one batch, as `Client.attribute` does."""
        check_on_error(on_error)
        options = AttributeOptions(model, target, method, score, channels, probabilities, timeout, map_dtype)
        template = options.template()
        batch = await asyncio.to_thread(EncodedBatch, single_batch(images, served_classes))  # it may read files
        check_classes(template, batch)
        return raise_if_failed(
            await self._explain(template, batch, timeout_s=timeout, metadata=checked_metadata(metadata)), on_error
        )

    @options_by_name
    def stream(
        self,
        batches: Iterable[Images | Batch] | AsyncIterable[Images | Batch],
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
    ) -> AsyncGenerator[Attribution]:
        """Yield the maps of many batches as they are ready, as `Client.stream` does.

        `batches` may be an asynchronous iterable, which is read in the loop, or an ordinary one, which is read in a
        thread; neither is read beyond the window. If you may leave the loop over the answers early, wrap the generator
        in `contextlib.aclosing`: otherwise the stream runs until the generator is garbage-collected.
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

    async def info(self, *, metadata: Metadata = ()) -> ServerInfo:
        """Return the version, limits, methods and models of a server; with several, of the next one."""
        await ready(self._core.pool, self._core.connect_timeout_s)
        return await asyncio.to_thread(self._core.info, metadata=metadata)

    async def model(self, name: str | None = None, *, metadata: Metadata = ()) -> ModelInfo:
        """Return one model with its labels and layers; None is the default model."""
        await ready(self._core.pool, self._core.connect_timeout_s)
        return await asyncio.to_thread(self._core.model, name, metadata=metadata)

    async def reload(
        self,
        name: str | None = None,
        *,
        timeout: float = RELOAD_TIMEOUT_S,  # noqa: ASYNC109
        metadata: Metadata = (),
    ) -> ModelInfo:
        """Reload a model from its source, as `Client.reload` does."""
        await ready(self._core.pool, self._core.wait_s(span(timeout, "timeout")))
        return await asyncio.to_thread(self._core.reload, name, timeout=timeout, metadata=metadata)

    async def _explain(
        self, template: pb.AttributeRequest, batch: EncodedBatch, *, timeout_s: float, metadata: Headers
    ) -> Attribution:
        core, policy = self._core, RetryPolicy(timeout_s, retry=self._core.retry)
        await ready(self._core.pool, self._core.wait_s(timeout_s))
        if not core.shared_memory:
            request = unary_request(template, batch)
            if await asyncio.to_thread(core.fits, request, batch, within_s=timeout_s):
                return await self._call_unary(request, batch, policy=policy, metadata=metadata)
        options = self._core.options_for_parts(template, policy, metadata)
        answers = self._answers([batch], options)
        async with contextlib.aclosing(answers):
            answer = await anext(answers)
        if answer.error is not None:
            raise answer.error
        return answer

    async def _call_unary(
        self, request: pb.AttributeRequest, batch: EncodedBatch, *, policy: RetryPolicy, metadata: Headers
    ) -> Attribution:
        while True:
            connection = await ready(self._core.pool, self._core.wait_s(policy.left_s))
            try:
                with translate_errors(self._core.max_message_bytes), connection.calling(len(batch)):
                    call = connection.attribution.Attribute.future(request, timeout=policy.left_s, metadata=metadata)
                    response = await awaited(call)
                answer = read_answer(response.result, batch, baseline=given_array(request.method))
                connection.record_load(answer)
                return answer
            except SidelightError as error:
                if self._core.closed.is_set():
                    raise
                await asyncio.sleep(policy.delay_after(error))

    async def _answers(
        self, batches: Iterable[Images | Batch | EncodedBatch] | AsyncIterable[Images | Batch], options: StreamOptions
    ) -> AsyncGenerator[Attribution]:
        await ready(self._core.pool, self._core.wait_s(options.timeout_s))
        changed = asyncio.Event()
        source = CallersBatches(batches)
        stream = await asyncio.to_thread(self._core.open_stream, source, options, on_change=from_thread(changed.set))
        delivery = Delivery(stream, options)
        stream.start()
        try:
            with delivery.progress:
                while not isinstance(answered := stream.queue.take(), End):
                    if answered is None:
                        await changed.wait()
                        changed.clear()
                        continue
                    for answer in delivery.answers(answered):
                        yield answer
            if answered.error is not None:
                raise answered.error
        finally:
            source.close()
            # Shielded: a second cancellation, which anyio's scopes always send, would take the call from the queue of
            # the executor, and the stream would run on.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, stream.close))
