"""The stream: many batches in flight on one connection. Nothing about one batch ends it."""

import asyncio
import contextlib

import grpc
from sidelight.v1 import attribution_pb2 as pb

from . import replies
from .engine import Progress
from .errors import Cancelled, DeadlineExceeded, InvalidArgument, SidelightError, Unimplemented
from .explainer import Explainer, Inquiry

Context = grpc.aio.ServicerContext[pb.AttributeStreamRequest, pb.AttributeStreamResponse]
_Explaining = asyncio.Task[pb.Attribution | SidelightError]


class Stream:
    """One call of `AttributeStream`.

    A batch that was read gets one of the stream's own slots, and a permit, before the next message is read: a caller
    who sends faster than the device runs, or does not take its answers, is held back by gRPC's flow control. Both are
    held until the answer is written. A cancel needs neither, so it is read while all slots are taken, unless another
    batch came before it: that one waits, and nothing behind it is read.
    """

    def __init__(self, context: Context, explainer: Explainer, *, max_in_flight: int) -> None:
        self._context = context
        self._explainer = explainer
        self._slots = asyncio.Semaphore(max_in_flight)
        self._writing = asyncio.Lock()
        self._unanswered: dict[str, asyncio.Task[pb.Attribution | SidelightError]] = {}

    async def run(self) -> None:
        """Serve until the caller has sent all, or the server drains, and every batch that was read is answered."""
        # Said at once, so that a caller knows that somebody is there before it hands a batch over.
        await self._context.send_initial_metadata(())
        async with asyncio.TaskGroup() as group:
            draining = group.create_task(self._explainer.draining.wait())
            while message := await self._read(draining):
                await self._receive(message, group)
            draining.cancel()
        if self._explainer.draining.is_set():
            unavailable = "the server is shutting down; what has no answer was not begun"
            await self._context.abort(grpc.StatusCode.UNAVAILABLE, unavailable)

    async def _read(self, draining: asyncio.Task[bool]) -> pb.AttributeStreamRequest | SidelightError | None:
        """Return the next message, or what is wrong with it; None when no more is taken."""
        reading = asyncio.ensure_future(self._context.read())
        await asyncio.wait([reading, draining], return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            reading.cancel()
            return None
        message = reading.result()
        return message if isinstance(message, pb.AttributeStreamRequest | SidelightError) else None

    async def _receive(self, message: pb.AttributeStreamRequest | SidelightError, group: asyncio.TaskGroup) -> None:
        if isinstance(message, SidelightError):
            await self._fail("", message)
            return
        match message.WhichOneof("request"):
            case "attribute":
                await self._admit(message.attribute, group)
            case "cancel":
                self._cancel(message.cancel.id)
            case "register_region":
                unserved = Unimplemented("register_region: shared memory is not served by this version")
                await self._fail(message.register_region.id, unserved)
            case _:
                await self._fail("", InvalidArgument("request: unset; expected attribute, cancel or register_region"))

    async def _admit(self, request: pb.AttributeRequest, group: asyncio.TaskGroup) -> None:
        try:
            if not request.id:
                raise InvalidArgument("id: empty; on a stream it is required, to match the answer")
            if request.id in self._unanswered:
                raise InvalidArgument(f'id: "{request.id}" is of a batch that is not answered yet')
            inquiry = self._explainer.inquire(request)
            await self._wait(inquiry)
        except SidelightError as error:
            await self._fail(request.id, error)
            return
        progress = Progress() if request.output.partial else None
        self._unanswered[request.id] = explaining = group.create_task(self._explain(inquiry, progress))
        group.create_task(self._answer(inquiry, explaining, progress))

    async def _wait(self, inquiry: Inquiry) -> None:
        """Take a slot and a permit, within the batch's own time."""
        try:
            async with asyncio.timeout_at(inquiry.deadline_s):
                await self._slots.acquire()
        except TimeoutError:
            raise DeadlineExceeded("timeout: it passed while all slots of the stream were taken") from None
        try:
            await self._explainer.admit(inquiry)
        except BaseException:
            self._slots.release()
            raise

    async def _explain(self, inquiry: Inquiry, progress: Progress | None) -> pb.Attribution | SidelightError:
        """Return the failure instead of raising it: a task that raises ends its group, and so the stream."""
        try:
            return await self._explainer.explain(inquiry, progress)
        except SidelightError as error:
            return error

    async def _answer(self, inquiry: Inquiry, explaining: _Explaining, progress: Progress | None) -> None:
        id_ = inquiry.message.id
        try:
            if progress:
                await self._report(inquiry, explaining, progress)
            await asyncio.wait([explaining])
            del self._unanswered[id_]
            if explaining.cancelled():
                await self._fail(id_, Cancelled("the caller took the batch back"))
            elif isinstance(outcome := explaining.result(), SidelightError):
                await self._fail(id_, outcome)
            else:
                await self._write(pb.AttributeStreamResponse(id=id_, result=outcome))
        finally:
            self._explainer.admission.release(inquiry.n_bytes)
            self._slots.release()

    async def _report(self, inquiry: Inquiry, explaining: _Explaining, progress: Progress) -> None:
        """Write maps that are not final, the newest each time there is room for one, until they are."""
        while not explaining.done():
            improving = asyncio.ensure_future(progress.improved.wait())
            try:
                await asyncio.wait([explaining, improving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                improving.cancel()
            async with self._writing:  # the newest is taken once it can be written, not before
                if not explaining.done():
                    with contextlib.suppress(SidelightError):  # what is wrong with it the final answer will say
                        partial = self._explainer.reply(progress.take(), inquiry)
                        await self._send(pb.AttributeStreamResponse(id=inquiry.message.id, result=partial))

    def _cancel(self, id_: str) -> None:
        if explaining := self._unanswered.get(id_):
            explaining.cancel()

    async def _fail(self, id_: str, error: SidelightError) -> None:
        await self._write(pb.AttributeStreamResponse(id=id_, failure=replies.failure(error)))

    async def _write(self, response: pb.AttributeStreamResponse) -> None:
        async with self._writing:
            await self._send(response)

    async def _send(self, response: pb.AttributeStreamResponse) -> None:
        # A caller who has gone is no fault, and gRPC is about to cancel this call.
        with contextlib.suppress(grpc.aio.InternalError):
            await self._context.write(response)
