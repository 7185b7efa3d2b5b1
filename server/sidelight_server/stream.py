"""The stream: many batches in flight on one connection. Nothing about one batch ends it."""

import asyncio
import contextlib

import grpc
from sidelight.v1 import attribution_pb2 as pb

from . import replies
from .errors import Cancelled, InvalidArgument, SidelightError, Unimplemented
from .explainer import Explainer, Inquiry

Context = grpc.aio.ServicerContext[pb.AttributeStreamRequest, pb.AttributeStreamResponse]


class Stream:
    """One call of `AttributeStream`.

    It reads a message only when one of its own slots is free, and admits it before it reads the next: a caller who
    sends faster than the device runs, or does not take its answers, is held back by gRPC's flow control. A slot and a
    permit are held until the answer is written.
    """

    def __init__(self, context: Context, explainer: Explainer, *, max_in_flight: int) -> None:
        self._context = context
        self._explainer = explainer
        self._slots = asyncio.Semaphore(max_in_flight)
        self._writing = asyncio.Lock()
        self._unanswered: dict[str, asyncio.Task[pb.Attribution | SidelightError]] = {}

    async def run(self) -> None:
        """Serve until the caller has sent all, or the server drains, and every batch that was read is answered."""
        async with asyncio.TaskGroup() as group:
            draining = group.create_task(self._explainer.draining.wait())
            while message := await self._read(draining):
                await self._receive(message, group)
            draining.cancel()
        if self._explainer.draining.is_set():
            unavailable = "the server is shutting down; what has no answer was not begun"
            await self._context.abort(grpc.StatusCode.UNAVAILABLE, unavailable)

    async def _read(self, draining: asyncio.Task[bool]) -> pb.AttributeStreamRequest | SidelightError | None:
        """Return the next message, or what is wrong with it, once it has a slot; None when no more is taken."""
        await self._slots.acquire()
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
            self._slots.release()
            return
        match message.WhichOneof("request"):
            case "attribute":
                await self._admit(message.attribute, group)
                return
            case "cancel":
                self._cancel(message.cancel.id)
            case "register_region":
                unserved = Unimplemented("register_region: shared memory is not served by this version")
                await self._fail(message.register_region.id, unserved)
            case _:
                await self._fail("", InvalidArgument("request: unset; expected attribute, cancel or register_region"))
        self._slots.release()

    async def _admit(self, request: pb.AttributeRequest, group: asyncio.TaskGroup) -> None:
        try:
            if not request.id:
                raise InvalidArgument("id: empty; on a stream it is required, to match the answer")
            if request.id in self._unanswered:
                raise InvalidArgument(f'id: "{request.id}" is of a batch that is not answered yet')
            inquiry = self._explainer.inquire(request)
            await self._explainer.admit(inquiry)
        except SidelightError as error:
            await self._fail(request.id, error)
            self._slots.release()
            return
        self._unanswered[request.id] = explaining = group.create_task(self._explain(inquiry))
        group.create_task(self._answer(request.id, explaining, inquiry.n_bytes))

    async def _explain(self, inquiry: Inquiry) -> pb.Attribution | SidelightError:
        """Return the failure instead of raising it: a task that raises ends its group, and so the stream."""
        try:
            return await self._explainer.explain(inquiry)
        except SidelightError as error:
            return error

    async def _answer(self, id_: str, explaining: asyncio.Task[pb.Attribution | SidelightError], n_bytes: int) -> None:
        try:
            await asyncio.wait([explaining])
            del self._unanswered[id_]
            if explaining.cancelled():
                await self._fail(id_, Cancelled("the caller took the batch back"))
            elif isinstance(outcome := explaining.result(), SidelightError):
                await self._fail(id_, outcome)
            else:
                await self._write(pb.AttributeStreamResponse(id=id_, result=outcome))
        finally:
            self._explainer.admission.release(n_bytes)
            self._slots.release()

    def _cancel(self, id_: str) -> None:
        if explaining := self._unanswered.get(id_):
            explaining.cancel()

    async def _fail(self, id_: str, error: SidelightError) -> None:
        await self._write(pb.AttributeStreamResponse(id=id_, failure=replies.failure(error)))

    async def _write(self, response: pb.AttributeStreamResponse) -> None:
        async with self._writing:
            # A caller who has gone is no fault, and gRPC is about to cancel this call.
            with contextlib.suppress(grpc.aio.InternalError):
                await self._context.write(response)
