"""One batch of a stream: from the validated message to the written response."""

import asyncio
import contextlib
import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ...engine.completion import forget_cancellation, forget_frames
from ...engine.submission import Outcome
from ...errors import Cancelled, DeadlineExceeded, SidelightError
from ...telemetry.call_record import CallRecord
from ..execution import Execution
from ..request_handler import RequestHandler
from ..validated_request import ValidatedRequest
from .eager import CreateTask, run_eagerly
from .response_writer import ResponseWriter


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A batch whose model is not loaded yet. `validate` waits for the model and then validates."""

    validate: Callable[[], Awaitable[ValidatedRequest]]
    deadline_s: float | None  # on the event loop's clock


@dataclass(frozen=True, slots=True)
class BatchContext:
    """The parts of a stream that all of its batches use."""

    handler: RequestHandler
    writer: ResponseWriter
    slots: asyncio.Semaphore
    create_task: CreateTask
    on_end: "Callable[[Batch], None]"


class Batch:
    """One batch of a stream. Used on the event loop.

    It takes one of the stream's slots and a permit, and holds both until its answer is written. It has no task: the
    stream's reader starts it, a callback of the engine answers it, and the stream's writer ends it. A step continues in
    a task only if it has to wait for a slot, a permit, its model, or a worker thread.

    `n_bytes` is the length of its message. `fail` makes the response if it fails. `on_admitted` is called when it has
    its slot and permit or has failed, so that the next batch can wait for them, and may be called several times;
    `on_answer` is called when its answer is ready. The answer is queued after `turn`, if given, and then completes
    `queued`.
    """

    def __init__(
        self,
        context: BatchContext,
        *,
        n_bytes: int,
        fail: Callable[[SidelightError], bytes],
        call_record: CallRecord,
        turn: "asyncio.Future[None] | None",
        on_admitted: Callable[[], None],
        on_answer: Callable[[], None],
    ) -> None:
        self._context = context
        self.n_bytes = n_bytes
        self._fail = fail
        self._call_record = call_record
        self._turn = turn
        self._on_admitted = on_admitted
        self._on_answer = on_answer
        self.queued: asyncio.Future[None] | None = None
        self._execution: Execution | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._late = ""  # the message if its deadline passes now
        self._has_slot = False
        self._permits: contextlib.ExitStack | None = None
        self._refusal: SidelightError | None = None  # the error that the batch was dropped with, if any
        self._is_answered = self._is_offered = self._is_over = False

    @property
    def is_admitted(self) -> bool:
        return self._call_record.admitted_s is not None

    def start(self, validated: ValidatedRequest | Unloaded) -> None:
        """Admit the batch and submit it to the engine.

        An unloaded batch counts as admitted once it has a slot, so that it does not delay the stream's other batches.
        """
        self._set_deadline(validated.deadline_s)
        if isinstance(validated, Unloaded):
            # Never eagerly: while it waits for the model, validation uses the current task.
            self._go_on_in(self._context.create_task(self._step(functools.partial(self._load, validated))))
        else:
            self._run(functools.partial(self._explain, validated))

    def cancel(self) -> None:
        """Drop the rows that have not run and answer CANCELLED, unless the batch is already answered."""
        self.drop(Cancelled("the caller cancelled the batch"))

    def drop(self, error: SidelightError) -> None:
        """Drop the rows that have not run and answer with this error, unless the batch is already answered."""
        if self._refusal or self._is_answered:
            return
        self._refusal = error
        if self._execution:
            self._execution.cancel()
        if self._task:  # it answers once it has ended: until then a thread may use the caller's region
            self._task.cancel()
        else:
            self._answer_failure(error)

    def release(self, *, is_cut_off: bool = False) -> None:
        """Release slot and permit and end the call record: the answer is written, or the stream has ended.

        `is_cut_off`: the client did not accept an answer in time.
        """
        if self._is_over:
            return
        self._is_over = True
        self._stop_timer()
        if self._execution:
            self._execution.cancel()
        self._execution = None
        self._on_admitted()
        if self._permits:
            self._permits.close()
        if self._has_slot:
            self._context.slots.release()
        if is_cut_off and self._is_answered:
            self._call_record.cut_off()
        self._context.handler.telemetry.end(self._call_record)
        self._context.on_end(self)

    async def _load(self, unloaded: Unloaded) -> None:
        try:
            await self._take_slot()
        finally:
            self._on_admitted()
        self._stop_timer()  # validation applies the deadline itself
        validated = await unloaded.validate()
        self._set_deadline(validated.deadline_s)
        await self._explain(validated)

    async def _explain(self, validated: ValidatedRequest) -> None:
        try:
            await self._take_slot()
            self._late = "it passed while the server was full"
            self._permits = await self._context.handler.acquire_permits(validated)
        finally:
            self._on_admitted()
        self._late = "it passed; rows that had not run were dropped"
        self._execution = execution = self._context.handler.execution(validated)
        await execution.start(self._on_outcome, self._offer if validated.message.output.partial else None)

    async def _take_slot(self) -> None:
        if not self._has_slot:
            self._late = "it passed while all slots of the stream were taken"
            await self._context.slots.acquire()
            self._has_slot = True

    def _on_outcome(self, outcome: Outcome) -> None:
        if self._execution and not self._refusal:
            self._run(functools.partial(self._reply, self._execution, outcome))

    async def _reply(self, execution: Execution, outcome: Outcome) -> None:
        self._answer(await execution.reply(outcome))

    def _offer(self) -> None:
        """Write the newest partial maps as soon as the stream can be written to, unless the final ones come first."""
        if not self._is_offered:
            self._is_offered = True
            self._context.writer.put(self._partial)

    async def _partial(self) -> bytes | None:
        self._is_offered = False
        if self._execution is None or self._is_answered:
            return None
        try:
            return await self._execution.partial()
        except SidelightError:  # the final answer will carry it
            return None

    def _run(self, step: Callable[[], Awaitable[None]]) -> None:
        self._go_on_in(run_eagerly(self._step(step), self._context.create_task))

    async def _step(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except SidelightError as error:
            self._answer_failure(error)
            forget_frames(error)

    def _go_on_in(self, task: "asyncio.Task[None] | None") -> None:
        self._task = task
        if task:
            # A callback, because a task that is cancelled before its first step runs nothing of its coroutine.
            task.add_done_callback(self._task_ended)

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        if self._task is task:
            self._task = None
        forget_cancellation(task)
        if self._refusal and not self._is_over:
            self._answer_failure(self._refusal)

    def _answer_failure(self, error: SidelightError) -> None:
        if not self._is_answered:
            self._context.handler.telemetry.failed(self._call_record, error)
            self._answer(self._fail(error))

    def _answer(self, response: bytes) -> None:
        self._is_answered = True
        self._stop_timer()
        self._on_admitted()
        self._on_answer()
        if self._turn is None or self._turn.done():
            self._queue(response)
        else:
            self._turn.add_done_callback(lambda _: self._queue(response))

    def _queue(self, response: bytes) -> None:
        self._call_record.writing_s = time.monotonic()
        self._context.writer.put(response, self.release)
        if self.queued and not self.queued.done():
            self.queued.set_result(None)

    def _set_deadline(self, deadline_s: float | None) -> None:
        if deadline_s is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        self.drop(DeadlineExceeded(f"timeout: {self._late}"))

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
