"""A stream worker: one server's share of a stream. It connects, sends, receives, and reconnects.

Two threads work for it: its own, which receives, and gRPC's, which asks the desk for the next message to send.
"""

import contextvars
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import grpc

from .._options import Headers
from .._transport.channel import Connection
from .._transport.shared_memory import Regions
from .._transport.wire import Incoming, Outgoing
from ..exceptions import Cancelled, ResourceExhausted, SidelightError, Unavailable, from_rpc

BEGIN_HEADER = "sidelight-begin"  # with which a server says that it has the call; a proxy without one does not
END_TRAILER = "sidelight-end"  # with which a server says that it ended the stream itself, all that it read answered
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 2.0
# A call that ended so was cut: by the end of the server's process, or by something between, whose reset gRPC tells in
# one of these ways. Another call may go well. A server ends no stream so by itself without its trailer.
_RETRYABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
# A server says so of a caller that did not take its answers, as one does not that was stopped for a while.
_STALLED = grpc.StatusCode.ABORTED


class StreamCoordinator(Protocol):
    """What a worker asks for and tells. All of it may be called from any thread."""

    def wait_until_ready(self, connection: Connection, not_before_s: float) -> bool:
        """Wait for a server, and for a time. False once the stream is over."""

    def call_started(self, worker: "StreamWorker") -> None:
        """Say that the server has taken the call."""

    def next_request(self, worker: "StreamWorker", call: object) -> Outgoing | None:
        """Wait for the next message to send; None once the call, or the stream, is over."""

    def received(self, worker: "StreamWorker", incoming: Incoming) -> None:
        """Take an answer in."""

    def call_ended(self, worker: "StreamWorker", cause: SidelightError, *, failed: bool, died: bool) -> None:
        """Say that the call has ended, whether it failed, and whether the server may have died of what it held."""

    def end(self, error: BaseException | None) -> None:
        """End the stream."""


class StreamWorker:
    """One server's share of a stream."""

    def __init__(
        self,
        connection: Connection,
        coordinator: StreamCoordinator,
        *,
        max_message_bytes: int,
        make_regions: Callable[[Connection], Regions] | None = None,
        metadata: Headers = (),
    ) -> None:
        self.connection = connection
        self.call: object | None = None  # the one that the desk may give messages to
        self.regions: Regions | None = None  # of that call
        self._make_regions = make_regions
        self._metadata = metadata
        # Tracing reads the caller's span from it; the thread below would begin with an empty one.
        self._context = contextvars.copy_context()
        self._coordinator = coordinator
        self._max_message_bytes = max_message_bytes
        self._rpc: grpc.Call | None = None
        self._is_stopped = False
        self._cancel_reason: SidelightError | None = None
        self._thread = threading.Thread(target=self._run, name="sidelight-receive", daemon=True)

    def start(self) -> None:
        """Begin to look for the server."""
        self._thread.start()

    def cancel(self, reason: SidelightError | None = None) -> None:
        """End the running call, if any, and say why."""
        self._cancel_reason = reason
        rpc = self._rpc
        if rpc is not None:
            rpc.cancel()

    def stop(self) -> None:
        """End the running call, and one that is just being made."""
        self._is_stopped = True
        self.cancel()

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def _run(self) -> None:
        n_failures = 0  # calls in a row without an answer
        not_before_s = 0.0
        try:
            while self._coordinator.wait_until_ready(self.connection, not_before_s):
                answered, is_orderly = self._run_call()
                # An idle stream may be ended in order any number of times, and its server is there each time.
                n_failures = 0 if answered else 1 if is_orderly else n_failures + 1
                backoff_s = min(FIRST_BACKOFF_S * 2 ** min(n_failures, 8), LONGEST_BACKOFF_S)
                # Spread, so that many clients of a server that comes back do not come all at once.
                not_before_s = time.monotonic() + backoff_s * random.uniform(0.5, 1.0) if n_failures else 0.0
        except Exception as error:  # an answer that cannot be read: the caller must not wait for what never comes
            self._coordinator.end(error)

    def _run_call(self) -> tuple[bool, bool]:
        """Make one call of the stream. Returns whether anything was answered, and whether it ended with OK in order."""
        answered = is_orderly = False
        cause: SidelightError = Unavailable("the server ended the stream")
        failed = died = False
        if self._make_regions:
            try:
                self.regions = self._make_regions(self.connection)
            except Unavailable as error:
                self._coordinator.call_ended(self, error, failed=True, died=False)
                return False, False
        self._cancel_reason = None
        call = self.call = object()
        rpc = self._context.run(self.connection.open_stream, self._requests(call), metadata=self._metadata)
        self._rpc = rpc
        if self._is_stopped:
            rpc.cancel()
        try:
            # It comes at once from a server that is there.
            if any(key == BEGIN_HEADER for key, _ in rpc.initial_metadata() or ()):
                self._coordinator.call_started(self)
            for incoming in rpc:
                answered = True
                self._coordinator.received(self, incoming)
            is_orderly = any(key == END_TRAILER for key, _ in rpc.trailing_metadata() or ())
        except grpc.RpcError as error:
            failed, (cause, died) = True, self._to_client_error(error)
        finally:
            self.call = self._rpc = None
            rpc.cancel()
            self._coordinator.call_ended(self, cause, failed=failed, died=died)
            if self.regions:
                self.regions.close()
        return answered, is_orderly

    def _requests(self, call: object) -> Iterator[Outgoing]:
        """Give gRPC what is to be sent. Runs in a thread of gRPC's, which would keep an error to itself."""
        try:
            while (request := self._coordinator.next_request(self, call)) is not None:
                yield request
        except Exception as error:
            if self.call is call:  # a region of a call that has ended cannot be written to, and need not be
                self._coordinator.end(error)

    def _to_client_error(self, error: grpc.RpcError) -> tuple[SidelightError, bool]:
        """Return why a call ended, and whether its server may have died. What no other call will mend ends all."""
        if self.connection.is_closed:
            cause: SidelightError = Cancelled("the client was closed")
            self._coordinator.end(cause)
            return cause, False
        if self._cancel_reason:
            return self._cancel_reason, True
        cause = from_rpc(error, max_message_bytes=self._max_message_bytes)
        trailers = error.trailing_metadata() or ()
        is_orderly = error.code() is _STALLED or any(each.key == END_TRAILER for each in trailers)
        # This host has too many streams open. One of them may be this one's last call, which the server still counts.
        is_orderly |= isinstance(cause, ResourceExhausted) and cause.retry_delay_s is not None
        if not is_orderly and error.code() not in _RETRYABLE:
            self._coordinator.end(cause)
        # Who cancels a call is alive: a server, or what stands before it, that has too much to do.
        return cause, not is_orderly and error.code() is not grpc.StatusCode.CANCELLED
