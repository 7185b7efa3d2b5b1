"""The open calls that explain batches, of every service: one path for permits, statuses, call records and the drain."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from ..config.settings import Settings
from ..errors import DeadlineExceeded, Internal, ResourceExhausted, SidelightError, Unavailable
from ..security.authorization import Callers
from ..security.stream_limit import Peers
from ..telemetry.call_record import CallRecord
from ..wire.codec import Decoded, Received, Unreadable
from .limits.receive_limit import Pace
from .limits.write_timeout import WriteTimeout
from .request_handler import RequestHandler
from .status import Context, abort
from .streaming.stream import Stream, StreamOptions
from .validated_request import ValidatedRequest

DEADLINE_SLACK_S = 0.1
RAN_ERRORS = (DeadlineExceeded, Unavailable, Internal)  # errors of admitted requests that may have run

M = TypeVar("M", bound=Message)


class OpenCalls:
    """Runs unary calls and streams, and ends both when the server stops. Used on the event loop only."""

    def __init__(
        self,
        handler: RequestHandler,
        *,
        callers: Callers,
        write_timeout: WriteTimeout,
        pace: Pace,
        settings: Settings,
    ) -> None:
        self._handler = handler
        self._callers = callers
        self._write_timeout = write_timeout
        self._pace = pace
        self._settings = settings
        self._peers = Peers("streams (the server's max_peer_streams)", each=settings.max_peer_streams)
        self._streams: set[Stream[Any]] = set()
        self._unary: set[asyncio.Task[Any]] = set()
        self.n_shed = 0  # streams that were ended because memory was short
        self._is_draining = False
        self._is_given_up = False

    @property
    def n_streams(self) -> int:
        return len(self._streams)

    @property
    def n_unary(self) -> int:
        """Number of unary calls in progress."""
        return len(self._unary)

    @property
    def n_unanswered(self) -> int:
        """Number of batches that streams have read and not answered."""
        return sum(stream.n_unanswered for stream in list(self._streams))

    def end_waiting(self, waited_s: float) -> int:
        """End the streams that have waited longer than this for a message; return how many. Clients open new ones."""
        waiting = [stream for stream in self._streams if stream.waited_s > waited_s]
        for stream in waiting:
            stream.end("age")
        self.n_shed += len(waiting)
        return len(waiting)

    def drain(self) -> None:
        """Stop reading on every stream; batches that were read are still answered."""
        self._is_draining = True
        for stream in self._streams:
            stream.end("shutdown")

    def give_up(self) -> None:
        """Fail every unanswered request with `Unavailable`: the drain time has passed."""
        self._is_given_up = True
        for stream in list(self._streams):
            stream.give_up()
        for call in list(self._unary):
            call.cancel()

    async def run_unary(
        self,
        name: str,
        received: Decoded[M],
        context: Context,
        validate: Callable[[Received[M], CallRecord], Awaitable[ValidatedRequest]],
    ) -> bytes:
        """Explain the batch of a unary call, whose message `validate` validates. Aborts the call on failure."""
        call = asyncio.current_task()
        assert call  # noqa: S101
        self._unary.add(call)
        telemetry = self._handler.telemetry
        call_record = telemetry.begin(name, context.invocation_metadata, caller=self._callers.of(context))
        # Not `context.add_done_callback`: it would keep the context, and so the call, in a reference cycle.
        call.add_done_callback(lambda _: telemetry.end(call_record))
        try:
            if isinstance(received, Unreadable):
                raise received.error
            validated = await validate(received, call_record)
            permits = await self._handler.acquire_unary_permits(validated)
            # gRPC runs the handler in this task and ends it after the answer is written, not when it is returned.
            call.add_done_callback(lambda _: permits.close())
            answer = await self._handler.explain(validated)
            call_record.writing_s = time.monotonic()
            self._write_timeout.expect(call_record.cut_off)
            return answer
        except SidelightError as error:
            telemetry.failed(call_record, error)
            if call_record.admitted_s is None or not isinstance(error, RAN_ERRORS):
                self._pace.refuse(call_record.caller, received.n_bytes)
            self._write_timeout.expect()
            await abort(context, error)
        except asyncio.CancelledError:
            if call_record.admitted_s is None:
                self._pace.refuse(call_record.caller, received.n_bytes)
            if not self._is_given_up or context.cancelled():
                if _is_late(context):  # otherwise the client disconnected, which is the call record's default
                    telemetry.failed(call_record, DeadlineExceeded("the call's deadline passed"))
                raise
            call.uncancel()
            given_up = Unavailable("the server is shutting down, and its drain_s has passed")
            telemetry.failed(call_record, given_up)
            await abort(context, given_up)
        finally:
            self._unary.discard(call)

    async def run_stream(
        self, context: Context, make: Callable[[Context, RequestHandler, StreamOptions], Stream[Any]]
    ) -> None:
        """Make a stream and run it until it ends. Aborts the call if its host has too many."""
        options = StreamOptions(
            caller=self._callers.of(context),
            max_in_flight=self._settings.max_stream_in_flight,
            max_age_s=self._settings.max_stream_age_s,
            stalled_write_s=self._settings.stalled_write_s,
            write_timeout=self._write_timeout,
            pace=self._pace,
        )
        stream = make(context, self._handler, options)
        if self._is_draining:
            stream.end("shutdown")
        try:
            with self._peers.opens(context.peer()):
                self._streams.add(stream)
                await stream.run()
        except ResourceExhausted as error:
            self._handler.telemetry.refuse(stream.call, context.invocation_metadata, error)
            await abort(context, error)
        finally:
            self._streams.discard(stream)
            stream.drop_call()


def _is_late(context: Context) -> bool:
    """Whether a cancelled call had reached its deadline, give or take `DEADLINE_SLACK_S` between the two clocks."""
    left_s = context.time_remaining()
    return left_s is not None and left_s < DEADLINE_SLACK_S
