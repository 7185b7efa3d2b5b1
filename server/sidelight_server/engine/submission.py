"""A submission: one request on its way through the engine, from `Engine.submit` to its outcome."""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from ..domain import MANY_EXAMPLES, Answer, Request
from ..telemetry.call_record import CallRecord
from .active_request import ActiveRequest
from .answer import Clock
from .completion import call_soon, forget_cancellation
from .devices.device import Device
from .preparation.examples import Prepared, input_shape, prepare, resolve_layer, runs_inline
from .preparation.pool import PreparationPool, to_thread_if_many
from .registry.entry import Version

Outcome = Answer | Exception
OnDone = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class SubmissionContext:
    """The parts of an engine that all of its submissions share."""

    pool: PreparationPool
    choose_device: Callable[[], Device]
    assemble: Callable[..., Answer]  # of an active request, its clock, and whether it is final
    unanswered: "set[Submission]"


class Submission:
    """A submitted request. Used on the event loop that it was submitted on.

    A small request for a loaded model is prepared at once and joins its device; when its last example is done, a
    callback of the event loop assembles the answer. There is a task only while a request waits for anything else: its
    model, a decoder or a worker thread.
    """

    def __init__(
        self,
        request: Request,
        on_done: OnDone,
        context: SubmissionContext,
        *,
        on_improved: Callable[[], None] | None = None,
        call_record: CallRecord | None = None,
        device: Device | None = None,
    ) -> None:
        self._request = request
        self._on_done: OnDone | None = on_done  # None once it was called, or the request was cancelled
        self._on_improved = on_improved
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._admitted_s = time.monotonic()
        self._call_record = call_record or CallRecord("", self._admitted_s)
        self._task: asyncio.Task[None] | None = None
        self._clock = Clock(self._call_record.arrived_s, self._admitted_s, self._admitted_s)
        self.device = device  # that it runs on; None: not chosen yet
        self.active: ActiveRequest | None = None  # from its preparation to its answer

    def start(self, version: Version) -> None:
        """Prepare the request and submit it to a device. Raises `SidelightError` if it is rejected at once."""
        model, shape = version[0], input_shape(version[0], self._request.images)
        method = resolve_layer(model, self._request, shape)
        if method is not self._request.method:
            self._request = replace(self._request, method=method)
        if runs_inline(model, self._request):
            prepared = prepare(model, self._request, is_gone=self._context.pool.is_gone, shape=shape)
            self._join(self._activate(version, prepared))
        else:
            self._wait_in_task(functools.partial(self._prepare, version))

    def start_when(self, ready: Callable[[], Awaitable[Version]]) -> None:
        """Wait for the model's version, then start."""

        async def start() -> None:
            self.start(await ready())

        self._wait_in_task(start)

    def cancel(self) -> None:
        """Drop the rows that have not run; `on_done` is not called any more. No effect if it was called already."""
        if self._on_done:
            self._on_done = None
            if self._task:
                self._task.cancel()
            self._leave_device()
            self.active = self._task = None

    def fail(self, error: Exception) -> None:
        """End the request with an error, unless it has ended."""
        if on_done := self._on_done:
            self.cancel()
            on_done(error)

    def fail_soon(self, error: Exception) -> None:
        """Schedule `fail` on the event loop, from any thread."""
        call_soon(self._loop, functools.partial(self.fail, error))

    async def partial(self) -> Answer | None:
        """Return the answer so far, once `on_improved` was called; None if the request has ended."""
        return None if self.active is None else await self._assemble(self.active, final=False)

    def _wait_in_task(self, step: Callable[[], Awaitable[None]]) -> None:
        async def run() -> None:
            try:
                await step()
            except Exception as error:  # nobody awaits this task
                self._task = None
                self.fail(error)

        self._task = self._loop.create_task(run())
        self._task.add_done_callback(forget_cancellation)

    async def _prepare(self, version: Version) -> None:
        prepared = await self._context.pool.prepare(version[0], self._request, self._call_record.caller)
        self._join(await to_thread_if_many(self._request.n_examples, self._activate, version, prepared))

    def _activate(self, version: Version, prepared: Prepared) -> ActiveRequest:
        call_record = self._call_record
        call_record.examples, call_record.prepared_s = len(prepared.examples), time.monotonic()
        self._clock = Clock(call_record.arrived_s, self._admitted_s, call_record.prepared_s)
        self.device = self.device or self._context.choose_device()
        completions = self.device.worker.completions
        return ActiveRequest(
            self._request,
            version[self.device.index],
            prepared,
            on_done=functools.partial(completions.add, self._loop, self._complete),
            on_improved=self._on_improved and functools.partial(completions.add, self._loop, self._on_improved),
            id_=call_record.id,
            caller=call_record.caller,
            chunks=call_record.chunks,
        )

    def _join(self, active: ActiveRequest) -> None:
        """Submit the request to its device, unless no example is left to run."""
        self.active = active
        if active.is_done:
            self._loop.call_soon(self._complete)
            return
        assert self.device  # noqa: S101  (`_activate` has chosen it)
        self._context.unanswered.add(self)
        try:
            self.device.add(active)
        except BaseException:
            self._context.unanswered.discard(self)
            self.active = None
            raise

    def _leave_device(self) -> None:
        if self in self._context.unanswered and self.device and self.active:
            self._context.unanswered.discard(self)
            self.device.remove(self.active)
            self._call_record.started_s, self._call_record.rows = self.active.started_s, self.active.n_taken

    def _complete(self) -> None:
        """Assemble the answer: every example has a result or a failure."""
        if self._on_done is None or self.active is None:
            return
        self._leave_device()
        if self._request.n_examples > MANY_EXAMPLES:
            self._wait_in_task(functools.partial(self._answer, self.active))
            return
        try:
            answer = self._context.assemble(self.active, self._clock)
        except Exception as error:  # no memory for the maps
            self.fail(error)
        else:
            self._end(answer)

    async def _answer(self, active: ActiveRequest) -> None:
        self._end(await self._assemble(active))

    def _end(self, answer: Answer) -> None:
        if on_done := self._on_done:
            self._on_done = self.active = self._task = None  # which are in reference cycles
            on_done(answer)

    async def _assemble(self, active: ActiveRequest, *, final: bool = True) -> Answer:
        return await to_thread_if_many(
            self._request.n_examples, self._context.assemble, active, self._clock, final=final
        )


def store_outcome(answered: "asyncio.Future[Outcome]", outcome: Outcome) -> None:
    """Complete a future with an outcome, unless it was cancelled. With `functools.partial`, it is an `on_done`."""
    if not answered.done():
        answered.set_result(outcome)
