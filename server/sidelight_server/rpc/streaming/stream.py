"""Streams: many batches in flight on one call. A batch that fails does not end the stream."""

import asyncio
import contextlib
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import grpc
from google.protobuf.message import Message

from ...errors import SidelightError, Unavailable
from ...telemetry.call_record import CallRecord
from ...wire.codec import Decoded, Received, Unreadable
from ..limits.reading import read
from ..limits.receive_limit import Pace
from ..limits.write_timeout import WriteTimeout
from ..request_handler import RequestHandler
from ..validated_request import ValidatedRequest
from .batch import Batch, BatchContext, Unloaded
from .response_writer import ResponseWriter, StalledError

STALLED_STATUS_S = 10.0  # how long a client that did not accept an answer has to read the final status
BEGIN_HEADER, END_TRAILER = "sidelight-begin", "sidelight-end"

M = TypeVar("M", bound=Message)
Cause = Literal["age", "shutdown", "stalled"]
Context = grpc.aio.ServicerContext[Any, Any]
Fail = Callable[[SidelightError], bytes]
Prepare = Callable[[CallRecord], Awaitable[ValidatedRequest | Unloaded]]


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """The caller and the limits of a stream."""

    caller: str
    max_in_flight: int
    max_age_s: float  # 0: no limit
    stalled_write_s: float  # 0: no limit
    write_timeout: WriteTimeout
    pace: Pace


class Stream(ABC, Generic[M]):
    """One streaming call. A subclass handles its messages and passes batches to `_begin`.

    Backpressure: each batch takes one of the stream's slots and a permit before the next batch is read, so gRPC's flow
    control slows down a client that sends faster than the device runs or that does not read its answers. While a batch
    waits for its slot and permit, the stream still reads other messages and one further batch, so that a cancel, which
    needs neither slot nor permit, takes effect.
    """

    call: ClassVar[str]  # its name in telemetry
    is_ordered: ClassVar[bool] = False  # answers are written in the order of their batches, not as they are ready

    def __init__(self, context: Context, handler: RequestHandler, options: StreamOptions) -> None:
        self._context = context
        self._handler = handler
        self._options = options
        self._writer = ResponseWriter(context, stalled_write_s=options.stalled_write_s)
        self._slots = asyncio.Semaphore(options.max_in_flight)
        self._admitting = asyncio.Lock()  # held by the one batch that waits for a slot and a permit
        self._unanswered: dict[str, Batch] = {}  # by an id that is unique among them
        self._batches: set[Batch] = set()  # unanswered ones, and those whose answer is not written yet
        self._batch_context: BatchContext  # while it runs
        self._all_answered: asyncio.Future[None] | None = None  # what the reader waits for in the end
        self._last: asyncio.Future[None] | None = None  # done once the last batch's answer is queued, if ordered
        self._reader: asyncio.Task[None] | None = None  # the task that waits for a message, if any
        self._waits_since_s = 0.0
        self._end: Cause | None = None
        self._is_given_up = False

    @abstractmethod
    async def _receive(self, received: Received[M]) -> None:
        """Handle one message."""

    @abstractmethod
    def _failed(self, id_: str, error: SidelightError) -> bytes:
        """Return the serialized response that carries a failure; the id is empty if the message has none."""

    def _close(self) -> None:
        """Release the stream's resources; every batch is answered."""

    async def _send_age_status(self, trailers: tuple[tuple[str, str], ...]) -> None:
        """End a stream that has reached its maximum age: with OK."""
        self._context.set_trailing_metadata(trailers)

    async def run(self) -> None:
        """Serve until the client half-closes or `end` is called, and every batch that was read is answered."""
        # Sent at once, so that the client detects the server before it sends a batch. It has a key of its own
        # because a proxy without a backend also sends initial metadata before its error status.
        await self._context.send_initial_metadata(((BEGIN_HEADER, "1"),))
        max_age_s = self._options.max_age_s
        age_timer = asyncio.get_running_loop().call_later(max_age_s, self.end, "age") if max_age_s else None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._writer.run())
                self._batch_context = BatchContext(
                    self._handler, self._writer, self._slots, group.create_task, self._batch_ended
                )
                while received := await self._read():
                    if isinstance(received, Unreadable):
                        self._options.pace.refuse(self._options.caller, received.n_bytes)
                        await self._refuse(received.error)
                    else:
                        await self._receive(received)
                if self._unanswered:
                    self._all_answered = asyncio.get_running_loop().create_future()
                    await self._all_answered
                self._writer.close()
        except* StalledError:
            self._end = "stalled"
        finally:
            if age_timer:
                age_timer.cancel()
            for batch in list(self._batches):
                batch.release(is_cut_off=self._end == "stalled")
            del self._batch_context  # which refers to this call's task
            self._close()
        await self._send_status()

    def drop_call(self) -> None:
        """Drop the references to the call. gRPC ends it once nothing refers to it, and batches may be in cycles."""
        self._writer.drop_call()
        self._unanswered.clear()
        self._batches.clear()
        del self._context

    @property
    def waited_s(self) -> float:
        """Seconds since it began to wait for the current message or the rest of it; 0 while it does not wait."""
        return time.monotonic() - self._waits_since_s if self._reader else 0.0

    @property
    def n_unanswered(self) -> int:
        """Number of batches that were read and are not answered."""
        return len(self._unanswered)

    def end(self, cause: Cause) -> None:
        """Stop reading. Batches that were read are answered, then the stream ends."""
        self._end = self._end or cause
        if self._reader:
            self._reader.cancel()
            self._reader = None

    def give_up(self) -> None:
        """Fail every unanswered batch with `Unavailable`: the server's drain time has passed."""
        self._is_given_up = True
        for batch in list(self._unanswered.values()):
            batch.drop(_given_up())

    async def _send_status(self) -> None:
        """End the call: with OK after a half-close, else with the status of the cause."""
        trailers = ((END_TRAILER, self._end),) if self._end else ()
        match self._end:
            case "age":
                await self._send_age_status(trailers)
            case "shutdown":
                unavailable = "the server is shutting down; batches without an answer were not started"
                await self._context.abort(grpc.StatusCode.UNAVAILABLE, unavailable, trailers)
            case "stalled":
                # gRPC sends the status after the answer that is still pending. Permits and files are already released,
                # so a client that starts reading again gets the status; after STALLED_STATUS_S the call is cut off.
                stalled = (
                    f"an answer was not accepted within {self._options.stalled_write_s:g} s (the server's "
                    "stalled_write_s): read answers while batches are sent"
                )
                try:
                    async with asyncio.timeout(STALLED_STATUS_S):
                        await self._context.abort(grpc.StatusCode.ABORTED, stalled, trailers)
                except TimeoutError:
                    if call := asyncio.current_task():
                        self._options.write_timeout.cut_off(call)
                        await asyncio.sleep(0)  # the cancellation is raised here

    async def _read(self) -> Decoded[M] | None:
        """Return the next message or its decoding error; None at the end of the stream or once it is ending."""
        if self._end:
            return None
        self._reader, self._waits_since_s = asyncio.current_task(), time.monotonic()
        try:
            await self._options.pace.wait(self._options.caller)
            message: Any = await read(self._context)
        except asyncio.CancelledError:
            # Cancelled by `end`, which has cleared `_reader`; by gRPC, if the client disconnected; or by the task
            # group, if a write stalled.
            this = asyncio.current_task()
            if self._reader or not this or this.uncancel():
                raise
            return None
        finally:
            self._reader = None
        return None if message is grpc.aio.EOF else message

    async def _begin(self, id_: str, received: Received[M], prepare: Prepare, fail: Fail) -> None:
        """Start to answer a batch: `prepare` validates it, `fail` makes the response if it fails."""
        telemetry = self._handler.telemetry
        call_record = telemetry.begin(self.call, self._context.invocation_metadata, caller=self._options.caller)
        waiting = contextlib.ExitStack()  # closed, perhaps twice, once the batch is admitted or has failed
        turn = self._last
        try:
            waiting.enter_context(self._handler.acquire_waiting_permit(received.held_bytes, self._options.caller))
            await self._admitting.acquire()
            waiting.callback(self._admitting.release)
            if self._is_given_up:
                raise _given_up()
            validated = await prepare(call_record)
            if self._is_given_up:  # while the batch was prepared
                raise _given_up()
        except SidelightError as error:
            waiting.close()
            self._options.pace.refuse(self._options.caller, received.n_bytes)
            telemetry.failed(call_record, error)
            telemetry.end(call_record)
            if turn:
                await asyncio.wait([turn])
            await self._writer.write(fail(error))
            return
        except asyncio.CancelledError:  # the client disconnected
            waiting.close()
            self._options.pace.refuse(self._options.caller, received.n_bytes)
            telemetry.end(call_record)
            raise
        batch = Batch(
            self._batch_context,
            n_bytes=received.n_bytes,
            fail=fail,
            call_record=call_record,
            turn=turn,
            on_admitted=waiting.close,
            on_answer=functools.partial(self._forget, id_),
        )
        if self.is_ordered:
            self._last = batch.queued = asyncio.get_running_loop().create_future()
        self._unanswered[id_] = batch
        self._batches.add(batch)
        batch.start(validated)

    def _batch_ended(self, batch: Batch) -> None:
        self._batches.discard(batch)
        if not batch.is_admitted:
            self._options.pace.refuse(self._options.caller, batch.n_bytes)

    def _forget(self, id_: str) -> None:
        del self._unanswered[id_]
        if self._all_answered and not self._unanswered and not self._all_answered.done():
            self._all_answered.set_result(None)

    async def _refuse(self, error: SidelightError) -> None:
        """Reply to a message that has no usable id."""
        self._handler.telemetry.refuse(self.call, self._context.invocation_metadata, error)
        await self._writer.write(self._failed("", error))


def _given_up() -> Unavailable:
    return Unavailable("the server is shutting down, and its drain_s has passed; send the batch elsewhere")
