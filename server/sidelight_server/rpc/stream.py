"""`AttributeStream`: many batches in flight on one call. A batch that fails does not end the stream."""

import asyncio
import contextlib
import functools
import time
from typing import Any, Literal

import grpc
from sidelight.v1 import attribution_pb2 as pb

from ..errors import InvalidArgument, SidelightError, Unavailable
from ..telemetry.call_record import CallRecord
from ..wire.codec import Decoded, Received, Unreadable
from .handler import RequestHandler, ValidatedRequest
from .receive_limit import Pace
from .response_writer import ResponseWriter, StalledError
from .shared_memory import Regions
from .status import forget_frames
from .stream_batch import Batch, Validate, failed
from .write_timeout import WriteTimeout

CALL = "AttributeStream"
STALLED_STATUS_S = 10.0  # how long a client that did not accept an answer has to read the final status
BEGIN_HEADER, END_TRAILER = "sidelight-begin", "sidelight-end"

Cause = Literal["age", "shutdown", "stalled"]
Context = grpc.aio.ServicerContext[Any, Any]


class Stream:
    """One call of `AttributeStream`.

    Backpressure: each batch takes one of the stream's slots and a permit before the next batch is read, so gRPC's flow
    control slows down a client that sends faster than the device runs or that does not read its answers. While a batch
    waits for its slot and permit, the stream still reads other messages and one further batch, so that a cancel, which
    needs neither slot nor permit, takes effect.
    """

    def __init__(
        self,
        context: Context,
        handler: RequestHandler,
        regions: Regions,
        *,
        caller: str,
        max_in_flight: int,
        max_age_s: float,
        write_timeout: WriteTimeout,
        pace: Pace,
        stalled_write_s: float,
    ) -> None:
        self._context = context
        self._handler = handler
        self._regions = regions
        self._caller = caller
        self._max_age_s = max_age_s
        self._write_timeout = write_timeout
        self._pace = pace
        self._stalled_write_s = stalled_write_s
        self._writer = ResponseWriter(context, stalled_write_s=stalled_write_s)
        self._slots = asyncio.Semaphore(max_in_flight)
        self._admitting = asyncio.Lock()  # held by the one batch that waits for a slot and a permit
        self._unanswered: dict[str, Batch] = {}
        self._reader: asyncio.Task[None] | None = None  # the task that waits for a message, if any
        self._waits_since_s = 0.0
        self._end: Cause | None = None
        self._is_given_up = False

    async def run(self) -> None:
        """Serve until the client half-closes or `end` is called, and every batch that was read is answered."""
        # Sent at once, so that the client knows that a server is there before it sends a batch. It has a key of its own
        # because a proxy without a backend also sends initial metadata before its error status.
        await self._context.send_initial_metadata(((BEGIN_HEADER, "1"),))
        age_timer = asyncio.get_running_loop().call_later(self._max_age_s, self.end, "age") if self._max_age_s else None
        try:
            async with asyncio.TaskGroup() as group:
                while received := await self._read():
                    await self._receive(received, group)
        except* StalledError:
            self._end = "stalled"
        finally:
            if age_timer:
                age_timer.cancel()
            self._regions.close()
        await self._send_status()

    def release(self) -> None:
        """Drop the references to the call. gRPC ends it once nothing refers to it; batch tasks may be in cycles."""
        self._writer.release()
        self._unanswered.clear()
        del self._context

    @property
    def waited_s(self) -> float:
        """Seconds since it began to wait for the current message or the rest of it; 0 while it does not wait."""
        return time.monotonic() - self._waits_since_s if self._reader else 0.0

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
        """End the call: with OK after a half-close or at the maximum age, else with the status of the cause."""
        trailers = ((END_TRAILER, self._end),) if self._end else ()
        match self._end:
            case "shutdown":
                unavailable = "the server is shutting down; batches without an answer were not started"
                await self._context.abort(grpc.StatusCode.UNAVAILABLE, unavailable, trailers)
            case "stalled":
                # gRPC sends the status after the answer that is still pending. Permits and files are already released,
                # so a client that starts reading again gets the status; after STALLED_STATUS_S the call is cut off.
                stalled = (
                    f"an answer was not accepted within {self._stalled_write_s:g} s (the server's stalled_write_s): "
                    "read answers while batches are sent"
                )
                try:
                    async with asyncio.timeout(STALLED_STATUS_S):
                        await self._context.abort(grpc.StatusCode.ABORTED, stalled, trailers)
                except TimeoutError:
                    if call := asyncio.current_task():
                        self._write_timeout.cut_off(call)
                        await asyncio.sleep(0)  # the cancellation is raised here
            case _:
                self._context.set_trailing_metadata(trailers)

    async def _read(self) -> Decoded[pb.AttributeStreamRequest] | None:
        """Return the next message or its decoding error; None at the end of the stream or once it is ending."""
        if self._end:
            return None
        self._reader, self._waits_since_s = asyncio.current_task(), time.monotonic()
        try:
            await self._pace.wait(self._caller)
            message = await self._context.read()
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

    async def _receive(self, received: Decoded[pb.AttributeStreamRequest], group: asyncio.TaskGroup) -> None:
        if isinstance(received, Unreadable):
            self._pace.refuse(self._caller, received.n_bytes)
            await self._refuse(received.error)
            return
        match received.message.WhichOneof("request"):
            case "attribute":
                await self._begin(received, group)
            case "cancel":
                if batch := self._unanswered.get(received.message.cancel.id):
                    batch.cancel()
            case "register_region":
                await self._register(received.message.register_region)
            case _:
                await self._refuse(InvalidArgument("request: unset; expected attribute, cancel or register_region"))

    async def _begin(self, received: Received[pb.AttributeStreamRequest], group: asyncio.TaskGroup) -> None:
        telemetry = self._handler.telemetry
        call_record = telemetry.begin(CALL, self._context.invocation_metadata, caller=self._caller)
        request = received.message.attribute
        waiting = contextlib.ExitStack()  # closed, perhaps twice, once the batch is admitted or has failed
        try:
            waiting.enter_context(self._handler.wait(received.n_bytes, self._caller))
            await self._admitting.acquire()
            waiting.callback(self._admitting.release)
            validated = await self._validate(received, call_record)
        except SidelightError as error:
            waiting.close()
            self._pace.refuse(self._caller, received.n_bytes)
            telemetry.failed(call_record, error)
            telemetry.end(call_record)
            await self._fail(request.id, error)
            return
        except asyncio.CancelledError:  # the client disconnected
            waiting.close()
            telemetry.end(call_record)
            raise
        self._unanswered[request.id] = batch = Batch(
            validated,
            self._handler,
            self._writer,
            self._slots,
            message=request,
            call_record=call_record,
            on_admitted=waiting.close,
            on_answer=lambda: self._forget(request.id),
        )
        # Callbacks, because a task that is cancelled before its first step does not run its `finally`.
        running = group.create_task(batch.run(group))
        running.add_done_callback(lambda _: telemetry.end(call_record))
        running.add_done_callback(lambda _: waiting.close())
        running.add_done_callback(forget_frames)

    async def _validate(
        self, received: Received[pb.AttributeStreamRequest], call_record: CallRecord
    ) -> ValidatedRequest | Validate:
        """Validate a batch, or if its model is not loaded return the coroutine function that will validate it.

        Raises `Unavailable` after `give_up`.
        """
        request = received.message.attribute
        self._check_id(request.id)
        if self._is_given_up:
            raise _given_up()
        validate = functools.partial(
            self._handler.validate,
            request,
            n_bytes=received.n_bytes,
            data=received.data,
            regions=self._regions,
            call_record=call_record,
        )
        if self._handler.must_load(request):
            return validate
        validated = await validate()
        if self._is_given_up:  # meanwhile
            raise _given_up()
        return validated

    def _check_id(self, id_: str) -> None:
        if not id_:
            raise InvalidArgument("id: empty; on a stream it is required, to match the answer")
        if id_ in self._unanswered:
            raise InvalidArgument(f'id: "{id_}" is used by a batch that is not answered yet')

    def _forget(self, id_: str) -> None:
        del self._unanswered[id_]

    async def _register(self, request: pb.RegisterRegionRequest) -> None:
        try:
            if not request.id:
                raise InvalidArgument("id: empty; it is required, to match the answer")
            await self._regions.register(request.region, request.size_bytes)
        except SidelightError as error:
            await self._fail(request.id, error)
            return
        registered = pb.RegionRegistered(region=request.region)
        response = pb.AttributeStreamResponse(id=request.id, region_registered=registered)
        await self._writer.write(response.SerializeToString())

    async def _refuse(self, error: SidelightError) -> None:
        """Reply to a message that has no usable id."""
        self._handler.telemetry.refuse(CALL, self._context.invocation_metadata, error)
        await self._fail("", error)

    async def _fail(self, id_: str, error: SidelightError) -> None:
        await self._writer.write(failed(id_, error))


def _given_up() -> Unavailable:
    return Unavailable("the server is shutting down, and its drain_s has passed; send the batch elsewhere")
