"""The batching delay: a chunk waits for callers that were just answered, only as long as stated, and only for them."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from sidelight_server import Engine, ModelSpec, Request, Settings
from sidelight_server.engine.devices import batching_delay
from sidelight_server.engine.devices.batching_delay import SHARE, BatchingDelay
from torch import Tensor, nn

from support.engines import tried
from support.models import small_cnn


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_chunk_waits_until_the_answered_rows_are_back_or_the_share_of_the_last_chunk_is_over() -> None:
    clock = Clock()
    delay = BatchingDelay(clock=clock)
    delay.restart(n_waiting=1, n_answered=3, took_s=2.0)
    assert delay.left_s(n_waiting=1, limit=8) == pytest.approx(2.0 * SHARE)
    clock.now_s = 1.0 * SHARE
    assert delay.left_s(n_waiting=3, limit=8) == pytest.approx(1.0 * SHARE)
    assert delay.left_s(n_waiting=4, limit=8) == 0.0
    clock.now_s = 2.0 * SHARE
    assert delay.left_s(n_waiting=1, limit=8) == 0.0


def test_a_full_chunk_does_not_wait() -> None:
    delay = BatchingDelay(clock=Clock())
    delay.restart(n_waiting=8, n_answered=8, took_s=2.0)
    assert delay.left_s(n_waiting=8, limit=8) == 0.0


def test_a_single_caller_never_waits() -> None:
    delay = BatchingDelay(clock=Clock())
    delay.restart(n_waiting=0, n_answered=1, took_s=2.0)
    assert delay.left_s(n_waiting=1, limit=8) == 0.0


def test_nothing_waits_for_a_request_that_is_not_answered_yet() -> None:
    """Its rows are back in the scheduler already."""
    delay = BatchingDelay(clock=Clock())
    delay.restart(n_waiting=1, n_answered=0, took_s=2.0)
    assert delay.left_s(n_waiting=1, limit=8) == 0.0


class Sizes(nn.Module):
    """A model that records the number of rows of each chunk. The first waits until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_cnn()
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        self.reached.set()
        assert self.gate.wait(20)
        time.sleep(0.02)  # in which the rows of other callers arrive
        return self.inner(x)

    def __deepcopy__(self, memo: dict[int, object]) -> "Sizes":
        return self


async def until(reached: Callable[[], bool]) -> None:
    """Let other tasks run until a condition holds that has no event."""
    while not reached():  # noqa: ASYNC110
        await asyncio.sleep(0.0005)


def test_four_callers_that_wait_for_their_answers_share_each_chunk(
    monkeypatch: pytest.MonkeyPatch, device: str, floats: Tensor
) -> None:
    monkeypatch.setattr(batching_delay, "SHARE", 1e6)  # so that only the arrival of rows ends the delay
    module = Sizes()
    engine = tried(Engine([ModelSpec(module)], Settings(device=device)), floats)
    request = Request(floats[:1].numpy())

    async def caller() -> None:
        while True:
            assert not (await engine.attribute(request)).failures

    async def run() -> None:
        module.sizes.clear()
        module.reached.clear()
        module.gate.clear()
        callers = [asyncio.create_task(caller())]
        assert await asyncio.to_thread(module.reached.wait, 20)  # so it is alone in the first chunk
        callers += [asyncio.create_task(caller()) for _ in range(3)]
        await until(lambda: engine.n_unanswered == 4)
        module.gate.set()
        await until(lambda: len(module.sizes) >= 20)
        for each in callers:
            each.cancel()
        await asyncio.gather(*callers, return_exceptions=True)

    with engine:
        asyncio.run(run())
        assert module.sizes[:20] == [1, *[4] * 19]
