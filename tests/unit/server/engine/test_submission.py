"""`Engine.submit`: every request ends exactly once, on its own event loop, which a chunk wakes once."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sidelight_server import Answer, Engine, GradCAM, ModelSpec, Request, Settings
from sidelight_server.errors import NotFound, Unavailable
from torch import Tensor

from support.engines import tried
from support.models.gate import Gate, Gated

Outcome = Answer | Exception


class CountingLoop(asyncio.SelectorEventLoop):
    """An event loop that counts how often another thread wakes it."""

    n_woken = 0

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, **options: Any) -> asyncio.Handle:
        self.n_woken += 1
        return super().call_soon_threadsafe(callback, *args, **options)


@pytest.fixture
def engine(gate: Gate, device: str, floats: Tensor) -> Engine:
    return tried(Engine([ModelSpec(Gated(gate))], Settings(device=device)), floats)


def image(floats: Tensor) -> Request:
    return Request(floats[:1].numpy())


def test_a_chunk_wakes_the_event_loop_once_for_all_that_it_finished(engine: Engine, gate: Gate, floats: Tensor) -> None:
    outcomes: list[Outcome] = []
    loop = CountingLoop()

    async def run() -> None:
        all_done = asyncio.Event()

        def on_done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if len(outcomes) == 9:
                all_done.set()

        gate.shut()
        engine.submit(image(floats), on_done)
        assert gate.reached.wait(20)
        for _ in range(8):
            engine.submit(image(floats), on_done)
        gate.open()
        await all_done.wait()

    with engine, asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(run())
    assert all(isinstance(outcome, Answer) and not outcome.failures for outcome in outcomes)
    assert gate.n_rows == 9
    assert loop.n_woken == 2  # once for the first, once for the eight that shared a chunk


def test_a_submission_that_was_cancelled_has_no_outcome(engine: Engine, gate: Gate, floats: Tensor) -> None:
    outcomes: list[Outcome] = []

    async def run() -> None:
        gate.shut()
        cancelled = [engine.submit(image(floats), outcomes.append) for _ in range(3)]
        assert gate.reached.wait(20)  # one of them runs, the others wait
        for each in cancelled:
            each.cancel()
        assert engine.n_unanswered == 0
        gate.open()
        assert not (await engine.attribute(image(floats))).failures

    with engine:
        asyncio.run(run())
    assert not outcomes


def test_a_request_without_examples_to_run_ends_after_submit_has_returned(engine: Engine) -> None:
    outcomes: list[Outcome] = []

    async def run() -> None:
        engine.submit(Request(np.full((2, 3, 32, 32), np.nan, np.float32)), outcomes.append)
        assert not outcomes
        await asyncio.sleep(0)

    with engine:
        asyncio.run(run())
    (answer,) = outcomes
    assert isinstance(answer, Answer)
    assert [failure.example for failure in answer.failures] == [0, 1]


def test_a_request_that_is_rejected_at_once_raises(engine: Engine, floats: Tensor) -> None:
    async def run() -> None:
        engine.submit(Request(floats.numpy(), method=GradCAM(layer="nowhere")), pytest.fail)

    with engine, pytest.raises(NotFound, match="nowhere"):
        asyncio.run(run())
    assert engine.n_unanswered == 0


def test_an_engine_that_closes_ends_what_was_submitted(engine: Engine, gate: Gate, floats: Tensor) -> None:
    outcomes: list[Outcome] = []

    async def run() -> None:
        all_done = asyncio.Event()

        def on_done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            if len(outcomes) == 2:
                all_done.set()

        gate.shut()
        for _ in range(2):
            engine.submit(image(floats), on_done)
        assert gate.reached.wait(20)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        gate.open()
        await all_done.wait()
        await closing

    engine.start()
    asyncio.run(run())
    assert all(isinstance(outcome, Answer | Unavailable) for outcome in outcomes)
