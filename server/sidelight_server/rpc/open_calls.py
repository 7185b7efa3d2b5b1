"""The open calls that explain batches, of every service. They end when the server stops."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from ..config.settings import Settings
from ..errors import ResourceExhausted
from ..security.authorization import Callers
from ..security.stream_limit import Peers
from ..telemetry.call_record import CallRecord
from ..wire.codec import Decoded, Received
from .limits.receive_limit import Pace
from .limits.write_timeout import WriteTimeout
from .request_handler import RequestHandler
from .status import Context, abort
from .streaming.stream import Stream, StreamOptions
from .unary_call import UnaryCall
from .validated_request import ValidatedRequest

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
        self._unary: set[UnaryCall] = set()
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
            call.give_up()

    async def run_unary(
        self,
        name: str,
        received: Decoded[M],
        context: Context,
        validate: Callable[[Received[M], CallRecord], Awaitable[ValidatedRequest]],
    ) -> bytes:
        """Run a unary call: see `UnaryCall.run`."""
        call = UnaryCall(
            name,
            context,
            self._handler,
            caller=self._callers.of(context),
            write_timeout=self._write_timeout,
            pace=self._pace,
        )
        self._unary.add(call)
        if self._is_given_up:
            call.give_up()
        try:
            return await call.run(received, validate)
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
