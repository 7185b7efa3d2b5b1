"""One batch of a stream: from the validated message to the written response."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..errors import Cancelled, DeadlineExceeded, SidelightError
from ..telemetry.call_record import CallRecord
from .handler import Progress, RequestHandler, ValidatedRequest
from .response_writer import ResponseWriter, StalledError

_Explaining = asyncio.Task[bytes | SidelightError]
_NO_WAIT = contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A batch whose model is not loaded yet. `validate` waits for the model and then validates."""

    validate: Callable[[], Awaitable[ValidatedRequest]]
    deadline_s: float | None  # on the event loop's clock


class Batch:
    """One batch of a stream, answered by the task that runs `run`.

    It takes one of the stream's slots and a permit, and holds both until its answer is written. `on_admitted` is called
    when it has both or has failed, so that the next batch can wait for them, and may be called twice; `on_answer` is
    called before the answer is written, which waits for `turn`.

    An unloaded batch counts as admitted once it has a slot, so that it does not delay the stream's other batches.
    """

    def __init__(
        self,
        validated: ValidatedRequest | Unloaded,
        handler: RequestHandler,
        writer: ResponseWriter,
        slots: asyncio.Semaphore,
        *,
        fail: Callable[[SidelightError], bytes],
        call_record: CallRecord,
        turn: asyncio.Event | None,
        on_admitted: Callable[[], None],
        on_answer: Callable[[], None],
    ) -> None:
        self._validated = validated
        self._handler = handler
        self._writer = writer
        self._slots = slots
        self._fail = fail
        self._call_record = call_record
        self._turn = turn
        self._on_admitted = on_admitted
        self._on_answer = on_answer
        self._has_slot = False
        self._permit: contextlib.ExitStack | None = None
        self._refusal: SidelightError | None = None  # the error that the batch was dropped with, if any
        self._explaining: asyncio.Task[object] | None = None  # what `drop` cancels: this task or its child

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Write the answer or the failure. Raises `StalledError` if the client does not accept it in time."""
        try:
            response = await self._respond(group)
            self._on_answer()
            if self._turn:
                await self._turn.wait()
            self._call_record.writing_s = time.monotonic()
            await self._writer.write(response)
        except StalledError:
            self._call_record.cut_off()
            raise
        finally:
            self._release()

    def cancel(self) -> None:
        """Drop the rows that have not run and answer CANCELLED, unless the batch is already answered."""
        self.drop(Cancelled("the caller cancelled the batch"))

    def drop(self, error: SidelightError) -> None:
        """Drop the rows that have not run and answer with this error, unless the batch is already answered."""
        if not self._refusal:
            self._refusal = error
            if self._explaining:
                self._explaining.cancel()

    async def _respond(self, group: asyncio.TaskGroup) -> bytes:
        self._explaining = this = asyncio.current_task()
        try:
            try:
                if self._refusal:  # dropped before this task started
                    raise self._refusal
                validated = await self._acquire()
            finally:
                self._on_admitted()
            return await self._explain(validated, group)
        except SidelightError as error:
            return self._failed(error)
        except asyncio.CancelledError:
            if this and self._refusal and self._explaining is this:
                this.uncancel()
            if not self._refusal or (this and this.cancelling()):  # the whole stream ends
                raise
            return self._failed(self._refusal)

    def _failed(self, error: SidelightError) -> bytes:
        self._handler.telemetry.failed(self._call_record, error)
        return self._fail(error)

    async def _acquire(self) -> ValidatedRequest:
        """Take a slot and a permit within the batch's timeout; return the validated request."""
        validated = self._validated
        if isinstance(validated, ValidatedRequest):
            await self._take_slot(validated.deadline_s)
        else:
            await self._take_slot(validated.deadline_s)
            self._on_admitted()
            validated = await validated.validate()
        self._permit = await self._handler.admit(validated)
        return validated

    async def _take_slot(self, deadline_s: float | None) -> None:
        try:
            async with asyncio.timeout_at(deadline_s) if self._slots.locked() else _NO_WAIT:
                await self._slots.acquire()
        except TimeoutError:
            raise DeadlineExceeded("timeout: it passed while all slots of the stream were taken") from None
        self._has_slot = True

    def _release(self) -> None:
        if self._permit:
            self._permit.close()
        if self._has_slot:
            self._slots.release()

    async def _explain(self, validated: ValidatedRequest, group: asyncio.TaskGroup) -> bytes:
        if not validated.message.output.partial:
            return await self._handler.explain(validated)
        progress = Progress()
        explaining = group.create_task(self._outcome(validated, progress))
        self._explaining = explaining
        await self._report(explaining, validated, progress)
        outcome = await explaining
        if isinstance(outcome, SidelightError):
            raise outcome
        return outcome

    async def _outcome(self, validated: ValidatedRequest, progress: Progress) -> bytes | SidelightError:
        """Return the failure instead of raising it: a task that raises ends its group, and so the stream."""
        try:
            return await self._handler.explain(validated, progress)
        except SidelightError as error:
            return error

    async def _report(self, explaining: _Explaining, validated: ValidatedRequest, progress: Progress) -> None:
        """Write the newest partial maps each time the stream can be written to, until the final ones are ready."""
        while not explaining.done():
            improving = asyncio.ensure_future(progress.improved.wait())
            try:
                await asyncio.wait([explaining, improving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                improving.cancel()
            async with self._writer.lock:  # take the newest maps only once they can be written
                if not explaining.done():
                    with contextlib.suppress(SidelightError):  # the final answer will carry the error
                        if partial := await progress.take():
                            await self._writer.write_now(await self._handler.reply(partial, validated))
