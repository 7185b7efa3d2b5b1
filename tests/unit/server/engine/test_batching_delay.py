"""The batching delay: a chunk waits for callers that were just answered, only as long as stated, and only for them."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from sidelight_server import Engine, Gradient, IntegratedGradients, ModelSpec, Request, Settings, SmoothGrad
from sidelight_server.engine.devices import batching_delay
from sidelight_server.engine.devices.batching_delay import SHARE, BatchingDelay
from sidelight_server.methods.method import Method
from torch import Tensor, nn

from support.engines import tried
from support.models import small_cnn


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_chunk_waits_until_the_answered_callers_are_back_or_the_share_of_the_last_chunk_is_over() -> None:
    clock = Clock()
    delay = BatchingDelay(clock=clock)
    delay.restart(n_waiting=1, n_answered=3, took_s=2.0)
    assert delay.left_s(n_waiting=1) == pytest.approx(2.0 * SHARE)
    clock.now_s = 1.0 * SHARE
    assert delay.left_s(n_waiting=3) == pytest.approx(1.0 * SHARE)
    assert delay.left_s(n_waiting=4) == 0.0
    clock.now_s = 2.0 * SHARE
    assert delay.left_s(n_waiting=1) == 0.0


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
    async with asyncio.timeout(20):
        while not reached():  # noqa: ASYNC110
            await asyncio.sleep(0.0005)


METHODS = {
    "gradient": Gradient(),
    "integrated gradients": IntegratedGradients(steps=7),
    "SmoothGrad": SmoothGrad(samples=5),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_single_caller_is_never_delayed(
    method: Method, monkeypatch: pytest.MonkeyPatch, device: str, floats: Tensor
) -> None:
    """Whatever its requests have in common: a delay would last for ever."""
    monkeypatch.setattr(batching_delay, "SHARE", 1e6)
    engine = tried(Engine([ModelSpec(small_cnn())], Settings(device=device)), floats)

    async def run() -> None:
        async with asyncio.timeout(20):
            for n_examples in (4, 1, 3):
                request = Request(floats[:n_examples].numpy(), method=method)
                assert not (await engine.attribute(request)).failures

    with engine:
        asyncio.run(run())


def test_a_delay_does_not_hold_back_full_chunks_tasks_or_the_end(
    monkeypatch: pytest.MonkeyPatch, floats: Tensor
) -> None:
    """Two callers are answered together, and only one of them sends another request."""
    monkeypatch.setattr(batching_delay, "SHARE", 1e6)
    module = Sizes()
    engine = tried(Engine([ModelSpec(module)], Settings(device="cpu", max_chunk_rows=2)), floats)
    one, two = (Request(floats[:n].numpy()) for n in (1, 2))

    async def run() -> None:
        async with asyncio.timeout(20):
            await both_answered(engine, module, one)
            module.sizes.clear()
            assert not (await engine.attribute(two)).failures  # a full chunk
            await both_answered(engine, module, one)
            module.sizes.clear()
            waiting = asyncio.create_task(engine.attribute(one))
            await until(lambda: engine.n_unanswered == 1)
            await asyncio.sleep(0.1)
            (device,) = engine.devices
            assert device.worker.call(lambda: 7).result(20) == 7
            assert not module.sizes
            waiting.cancel()

    with engine:
        asyncio.run(run())  # and the end of the engine joins the device's thread


async def both_answered(engine: Engine, module: Sizes, request: Request) -> None:
    """Have two requests answered by one chunk."""
    module.reached.clear()
    module.gate.clear()
    first = asyncio.create_task(engine.attribute(request))
    assert await asyncio.to_thread(module.reached.wait, 20)
    others = [asyncio.create_task(engine.attribute(request)) for _ in range(2)]
    await until(lambda: engine.n_unanswered == 3)
    module.gate.set()
    await asyncio.gather(first, *others)


def test_four_callers_that_wait_for_their_answers_share_each_chunk(
    monkeypatch: pytest.MonkeyPatch, floats: Tensor
) -> None:
    monkeypatch.setattr(batching_delay, "SHARE", 1e6)  # so that only the arrival of rows ends the delay
    module = Sizes()
    engine = tried(Engine([ModelSpec(module)], Settings(device="cpu")), floats)
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
