"""A stream worker: makes the calls of a stream to one server, one after another, and reconnects.

It uses two threads: its own receives, and one of gRPC's takes the next message to send from the coordinator.
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

# Sent by a server when it has accepted the call. A proxy without a backend never sends it.
BEGIN_HEADER = "sidelight-begin"
# Sent by a server that ends a stream in order, after all answers.
END_TRAILER = "sidelight-end"
FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.1, 2.0
# Statuses of a call that was cut off: the server's process ended, or a proxy or the network reset the connection, which
# gRPC reports in one of these ways. Another call may succeed. A server itself never ends a stream with one of these
# without its trailer.
_RETRYABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
# The server ends the call of a client that did not read its answers, for example because it was suspended.
_STALLED = grpc.StatusCode.ABORTED


class WorkerCallbacks(Protocol):
    """What a worker calls; implemented by `Coordinator`. All methods are thread-safe."""

    def wait_until_ready(self, worker: "StreamWorker", not_before_s: float) -> bool:
        """Wait until `not_before_s` and until the server is connected. Returns False once the worker must end."""

    def call_started(self, worker: "StreamWorker") -> None:
        """Record that the server has accepted the call."""

    def next_request(self, worker: "StreamWorker", call: object) -> Outgoing | None:
        """Wait for the next message to send; None once the call or the stream is over."""

    def received(self, worker: "StreamWorker", incoming: Incoming) -> None:
        """Handle a response."""

    def call_ended(self, worker: "StreamWorker", cause: SidelightError, *, failed: bool, died: bool) -> None:
        """Record that the call has ended: `failed` with an error, perhaps because the server `died` of a part."""

    def end(self, error: BaseException | None) -> None:
        """End the stream."""


class StreamWorker:
    """Sends and receives the parts of a stream that one server is given."""

    def __init__(
        self,
        connection: Connection,
        coordinator: WorkerCallbacks,
        *,
        max_message_bytes: int,
        make_regions: Callable[[Connection], Regions] | None,
        metadata: Headers,
        context: contextvars.Context,
    ) -> None:
        self.connection = connection
        self.call: object | None = None  # identifies the running call to the coordinator
        self.regions: Regions | None = None  # of the running call
        self._make_regions = make_regions
        self._metadata = metadata
        self._context = context  # of the stream's caller
        self._coordinator = coordinator
        self._max_message_bytes = max_message_bytes
        self._rpc: grpc.Call | None = None
        self._is_stopped = False
        self._cancel_reason: SidelightError | None = None
        self._thread = threading.Thread(target=self._run, name="sidelight-receive", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def cancel(self, reason: SidelightError | None = None) -> None:
        """Cancel the running call, if any, for a reason that is passed on as the cause of its end."""
        self._cancel_reason = reason
        rpc = self._rpc
        if rpc is not None:
            rpc.cancel()

    def stop(self) -> None:
        """Cancel the running call, and one that is just being started."""
        self._is_stopped = True
        self.cancel()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        n_failures = 0  # calls in a row without an answer
        not_before_s = 0.0
        try:
            with self.connection.used():
                while self._coordinator.wait_until_ready(self, not_before_s):
                    answered, is_orderly = self._run_call()
                    # A server may end an idle stream in order any number of times: the backoff does not grow then.
                    n_failures = 0 if answered else 1 if is_orderly else n_failures + 1
                    backoff_s = min(FIRST_BACKOFF_S * 2 ** min(n_failures, 8), LONGEST_BACKOFF_S)
                    # Jitter, so that the clients of a restarted server do not all reconnect at once.
                    not_before_s = time.monotonic() + backoff_s * random.uniform(0.5, 1.0) if n_failures else 0.0
        except Exception as error:  # such as an invalid answer: without this the caller would wait forever
            self._coordinator.end(error)

    def _run_call(self) -> tuple[bool, bool]:
        """Make one call. Returns whether it received anything, and whether it ended in order with status OK."""
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
            # A running server sends its metadata at once.
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
        """Yield the messages to send. Runs in a thread of gRPC's, which would swallow an exception."""
        try:
            while (request := self._coordinator.next_request(self, call)) is not None:
                yield request
        except Exception as error:  # such as a lack of memory: without this the caller would wait forever
            if self.call is call:  # otherwise the call has ended, and its shared memory is closed
                self._coordinator.end(error)

    def _to_client_error(self, error: grpc.RpcError) -> tuple[SidelightError, bool]:
        """Return why a call failed, and whether its server may have died. Non-retryable errors end the stream."""
        if self.connection.is_closed:
            cause: SidelightError = Cancelled("the client was closed")
            self._coordinator.end(cause)
            return cause, False
        if self._cancel_reason:
            return self._cancel_reason, True
        cause = from_rpc(error, max_message_bytes=self._max_message_bytes)
        trailers = error.trailing_metadata() or ()
        is_orderly = error.code() is _STALLED or any(each.key == END_TRAILER for each in trailers)
        # This host has too many open streams. The server may still count this worker's previous call.
        is_orderly |= isinstance(cause, ResourceExhausted) and cause.retry_delay_s is not None
        if not is_orderly and error.code() not in _RETRYABLE:
            self._coordinator.end(cause)
        # A call is cancelled by a live server or proxy, for example under overload: no death.
        return cause, not is_orderly and error.code() is not grpc.StatusCode.CANCELLED
