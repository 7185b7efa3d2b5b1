"""A unary call that explains a batch: its permits, its status and its call record."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from ..errors import DeadlineExceeded, Internal, SidelightError, Unavailable
from ..telemetry.call_record import CallRecord
from ..wire.codec import Decoded, Received, Unreadable
from .limits.receive_limit import Pace
from .limits.write_timeout import WriteTimeout
from .request_handler import RequestHandler
from .status import Context, abort
from .validated_request import ValidatedRequest

DEADLINE_SLACK_S = 0.1
RAN_ERRORS = (DeadlineExceeded, Unavailable, Internal)  # errors of admitted requests that may have run

M = TypeVar("M", bound=Message)


class UnaryCall:
    """One unary call of any service. Used on the event loop, in the task in which gRPC runs its handler."""

    def __init__(
        self,
        name: str,
        context: Context,
        handler: RequestHandler,
        *,
        caller: str,
        write_timeout: WriteTimeout,
        pace: Pace,
    ) -> None:
        self._context = context
        self._handler = handler
        self._write_timeout = write_timeout
        self._pace = pace
        self._call_record = handler.telemetry.begin(name, context.invocation_metadata, caller=caller)
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self._is_given_up = False

    async def run(
        self, received: Decoded[M], validate: Callable[[Received[M], CallRecord], Awaitable[ValidatedRequest]]
    ) -> bytes:
        """Explain the batch, whose message `validate` validates. Aborts the call on failure."""
        call, call_record, telemetry = self._task, self._call_record, self._handler.telemetry
        assert call  # noqa: S101
        # Not `context.add_done_callback`: it would keep the context, and so the call, in a reference cycle.
        call.add_done_callback(lambda _: telemetry.end(call_record))
        try:
            if isinstance(received, Unreadable):
                raise received.error
            validated = await validate(received, call_record)
            permits = await self._handler.acquire_unary_permits(validated)
            # gRPC ends this task after the answer is written, not when it is returned.
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
            await abort(self._context, error)
        except asyncio.CancelledError:
            if call_record.admitted_s is None:
                self._pace.refuse(call_record.caller, received.n_bytes)
            if not self._is_given_up or self._context.cancelled():
                if _is_late(self._context):  # otherwise the client disconnected, which is the call record's default
                    telemetry.failed(call_record, DeadlineExceeded("the call's deadline passed"))
                raise
            call.uncancel()
            given_up = Unavailable("the server is shutting down, and its drain_s has passed")
            telemetry.failed(call_record, given_up)
            await abort(self._context, given_up)
        finally:
            self._task = None

    def give_up(self) -> None:
        """Fail with `Unavailable`, unless it is answered: the server's drain time has passed."""
        self._is_given_up = True
        if self._task:
            self._task.cancel()


def _is_late(context: Context) -> bool:
    """Whether a cancelled call had reached its deadline, give or take `DEADLINE_SLACK_S` between the two clocks."""
    left_s = context.time_remaining()
    return left_s is not None and left_s < DEADLINE_SLACK_S
