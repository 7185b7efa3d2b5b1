"""The explainer: one message's way through validation and engine, the same for unary calls and streams."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from sidelight.v1 import attribution_pb2 as pb

from . import replies, wire
from .admission import Admission
from .attribution import Answer, Request
from .engine import BYTES_OF_FLOAT32, Engine, Progress
from .errors import DeadlineExceeded, Internal, ResourceExhausted, SidelightError
from .tensors import map_itemsize

log = logging.getLogger("sidelight")

ENVELOPE_BYTES = wire.MAX_ID_BYTES + 16  # what the message around an answer adds: its id, tags and lengths


@dataclass(frozen=True, slots=True)
class Inquiry:
    """A message that was found right: what it asks for, what that holds in memory, and until when it may take."""

    message: pb.AttributeRequest
    request: Request
    n_bytes: int
    deadline_s: float | None  # on the event loop's clock


class Explainer:
    """Explains messages on an engine, within the permits of `admission`, until `draining` is set."""

    def __init__(self, engine: Engine) -> None:
        settings = engine.settings
        self._engine = engine
        self._limit_bytes = settings.max_message_bytes
        self.draining = asyncio.Event()
        self.admission = Admission(max_requests=settings.max_in_flight, max_bytes=settings.max_in_flight_bytes)

    def inquire(self, message: pb.AttributeRequest) -> Inquiry:
        """Check a message that has just arrived. A `SidelightError` says what is wrong with it."""
        with _telling(message.id):
            timeout_s = wire.timeout_s(message)
            request = wire.parse(message)
            answer_bytes, state_bytes = self._engine.held_bytes(request)
        self._refuse_long_answer(answer_bytes * map_itemsize(message.output) // BYTES_OF_FLOAT32)
        return Inquiry(
            message=message,
            request=request,
            n_bytes=message.ByteSize() + answer_bytes + state_bytes,
            deadline_s=None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s,
        )

    async def admit(self, inquiry: Inquiry) -> None:
        """Wait for a permit and take it; `admission.release` gives it back."""
        try:
            async with asyncio.timeout_at(inquiry.deadline_s):
                await self.admission.acquire(inquiry.n_bytes)
        except TimeoutError:
            raise DeadlineExceeded("timeout: it passed while the server was full") from None

    async def explain(self, inquiry: Inquiry, progress: Progress | None = None) -> pb.Attribution:
        """Return the answer. Nothing but a `SidelightError` says why there is none."""
        with _telling(inquiry.message.id):
            try:
                async with asyncio.timeout_at(inquiry.deadline_s):
                    answer = await self._engine.attribute(inquiry.request, progress)
            except TimeoutError:
                raise DeadlineExceeded("timeout: it passed; rows that had not run were dropped") from None
            return self._reply(answer, inquiry)

    def reply(self, answer: Answer, inquiry: Inquiry) -> pb.Attribution:
        """Return the message of an answer, which may not be final. `SidelightError` where it cannot be sent."""
        with _telling(inquiry.message.id):
            return self._reply(answer, inquiry)

    def _reply(self, answer: Answer, inquiry: Inquiry) -> pb.Attribution:
        reply = replies.result(answer, inquiry.message)
        self._refuse_long_answer(reply.ByteSize() + ENVELOPE_BYTES)
        return reply

    def _refuse_long_answer(self, n_bytes: int) -> None:
        if n_bytes > self._limit_bytes:
            raise ResourceExhausted(
                f"the answer takes {n_bytes} bytes, the server's max_message_bytes is {self._limit_bytes}: "
                "send fewer examples"
            )


@contextlib.contextmanager
def _telling(id_: str) -> Iterator[None]:
    """Let nothing but a `SidelightError` out. Of anything else the log has the cause, and the caller no details."""
    try:
        yield
    except SidelightError:
        raise
    except Exception as error:
        log.exception("event=unexpected id=%r", id_)
        raise Internal("the server failed; its log has the cause") from error
