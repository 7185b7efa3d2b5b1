"""Rows of all methods in one scheduler: fair, cancellable and bounded."""

import asyncio
import gc
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from sidelight_server import (
    Answer,
    Engine,
    GradCAM,
    Gradient,
    IntegratedGradients,
    ModelSpec,
    Request,
    Rule,
    Settings,
    SmoothGrad,
    TopK,
)
from sidelight_server.engine.example_run import ExampleRun
from torch import Tensor

from support.engines import tried
from support.models import small_cnn
from support.models.gate import Gate, Gated
from support.tolerances import NEIGHBORS

pytestmark = pytest.mark.slow

LONG = IntegratedGradients(steps=300)
TO_TOLERANCE = IntegratedGradients(steps=0, rule=Rule.TRAPEZOID, tolerance=1e-6, max_rows=300)


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until a condition holds that has no event."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.0005)


def together(engine: Engine, *asked: Callable[[Engine], Awaitable[object]]) -> list[object]:
    async def run() -> list[object]:
        return await asyncio.gather(*(each(engine) for each in asked), return_exceptions=True)

    with engine:
        return asyncio.run(run())


MARK = 100.0


class Ordered(torch.nn.Module):
    """Records the rows of each chunk, and in which chunk a marked row was. It waits at a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_cnn()
        self.gate = Gate()
        self.chunks: list[int] = []
        self.marked: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.chunks.append(len(x))
        if (x[:, 0, 0, 0] == MARK).any():
            self.marked.append(len(self.chunks))
        self.gate.wait(len(x))
        return self.inner(x)

    def __deepcopy__(self, memo: dict[int, object]) -> "Ordered":
        return self


def test_a_call_of_one_row_overtakes_integrals_of_three_hundred(device: str, floats: Tensor) -> None:
    """Counted in chunks by the model: after the running chunk it waits for at most one round."""
    module, chunk_rows, n_floods = Ordered(), 4, 10
    engine = Engine([ModelSpec(module)], Settings(device=device, max_chunk_rows=chunk_rows))
    call = floats[:1].clone()
    call[0, 0, 0, 0] = MARK

    async def run() -> list[int]:
        floods = [asyncio.create_task(engine.attribute(Request(floats.numpy(), method=LONG))) for _ in range(n_floods)]
        await until(lambda: len(module.chunks) >= 40)
        waited = []
        for _ in range(10):
            module.gate.shut()
            await asyncio.to_thread(module.gate.reached.wait, 20)
            running = len(module.chunks)
            asked = asyncio.create_task(engine.attribute(Request(call.numpy())))
            await until(lambda: engine.n_unanswered > n_floods)
            module.gate.open()
            await asked
            waited.append(module.marked[-1] - running)
        for each in floods:
            each.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
        return waited

    with engine:
        waited = asyncio.run(run())
    # One key more than that of the gradients: that of the integrals' looks at their examples and baselines.
    assert max(waited) <= -(-(n_floods + 1) // chunk_rows) + 1


def test_chunks_are_full_of_rows_of_many_requests(device: str, floats: Tensor) -> None:
    module = Ordered()
    engine = tried(Engine([ModelSpec(module)], Settings(device=device, max_chunk_rows=8)), floats)
    module.chunks.clear()
    few = Request(floats[:1].numpy(), method=IntegratedGradients(steps=16))
    together(engine, *[lambda engine: engine.attribute(few)] * 8)
    # 8 × (16 + 2) rows, some chunks at the beginning and at the end less than full.
    assert len(module.chunks) <= 8 * 18 / 8 + 8
    assert sum(module.chunks) == 8 * 18


def test_few_examples_of_a_request_are_in_progress_at_a_time(device: str) -> None:
    """Forty integrals of one batch hold the memory of a few: those with rows at the device."""
    engine = Engine([ModelSpec(small_cnn())], Settings(device=device, max_chunk_rows=4))
    images = np.random.default_rng(0).standard_normal((40, 3, 32, 32)).astype(np.float32)
    most = 0

    async def run() -> None:
        nonlocal most
        asked = asyncio.create_task(engine.attribute(Request(images, method=IntegratedGradients(steps=5))))
        while not asked.done():
            for submission in list(engine._unanswered):
                most = max(most, len(submission.active._open))
            await asyncio.sleep(0)
        assert not asked.result().failures

    with engine:
        asyncio.run(run())
    assert 0 < most <= 2 * 4


def n_states() -> int:
    gc.collect()
    return sum(type(each) is ExampleRun for each in gc.get_objects())


@pytest.mark.parametrize("method", [LONG, TO_TOLERANCE, SmoothGrad(samples=300)], ids=["integral", "refined", "noise"])
def test_cancelled_work_ends_within_a_chunk_and_leaves_nothing(
    method: object, device: str, floats: Tensor, gate: Gate
) -> None:
    before = n_states()
    engine = tried(Engine([ModelSpec(Gated(gate))], Settings(device=device, max_chunk_rows=4)), floats)

    async def run() -> None:
        gate.shut()
        asked = asyncio.create_task(engine.attribute(Request(floats.numpy(), method=method)))
        await asyncio.to_thread(gate.reached.wait, 20)
        asked.cancel()
        await asyncio.wait([asked])
        assert asked.cancelled()
        ran = gate.n_rows
        gate.open()
        again = await engine.attribute(Request(floats[:1].numpy()))
        assert not again.failures
        assert gate.n_rows == ran + 1  # no row of the cancelled ran after it

    with engine:
        asyncio.run(run())
    assert engine.cancellations.count == 1
    assert 0 < engine.cancellations.mean_s == engine.cancellations.longest_s
    assert engine.n_unanswered == 0
    assert n_states() == before


def test_a_storm_of_cancellations_leaks_nothing(device: str, floats: Tensor) -> None:
    """Half of them are cancelled at random moments: every state is released, and the next request is served."""
    before = n_states()
    engine = Engine([ModelSpec(small_cnn())], Settings(device=device, max_chunk_rows=8))
    methods = [
        Gradient(),
        IntegratedGradients(steps=7),
        SmoothGrad(samples=5),
        GradCAM(),
        replace(TO_TOLERANCE, max_rows=9),
    ]
    rng = random.Random(0)

    async def one(n: int) -> Answer | None:
        request = Request(floats[: 1 + n % 3].numpy(), method=methods[n % len(methods)])
        asked = asyncio.create_task(engine.attribute(request))
        if n % 2:
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
            asked.cancel()
        try:
            return await asked
        except asyncio.CancelledError:
            return None

    async def run() -> None:
        for begin in range(0, 500, 50):
            answers = await asyncio.gather(*(one(n) for n in range(begin, begin + 50)))
            assert all(answer is not None and not answer.failures for answer in answers[::2])
        assert not (await engine.attribute(Request(floats.numpy()))).failures

    with engine:
        asyncio.run(run())
    assert engine.n_unanswered == 0
    assert len(engine._devices[0].worker._scheduler) == 0
    assert n_states() == before
    assert engine.cancellations.count > 0


@pytest.mark.parametrize("depth", [1, 2], ids=["one chunk at the device", "two chunks at the device"])
def test_the_answer_is_the_same_with_another_chunk_already_at_the_device(
    depth: int, device: str, floats: Tensor
) -> None:
    engine = Engine([ModelSpec(small_cnn())], Settings(device=device, max_chunk_rows=3))
    engine._devices[0].worker._depth = depth
    requests = [
        Request(floats.numpy(), method=IntegratedGradients(steps=9)),
        Request(floats.numpy(), method=replace(TO_TOLERANCE, max_rows=65)),
        Request(floats.numpy(), method=SmoothGrad(samples=5)),
        Request(floats.numpy()),
        Request(floats.numpy(), target=TopK(2), method=IntegratedGradients(steps=3)),
    ]

    async def run() -> tuple[list[Answer], list[Answer]]:
        alone = [await engine.attribute(each) for each in requests]
        return alone, await asyncio.gather(*(engine.attribute(each) for each in requests))

    with engine:
        alone, neighbors = asyncio.run(run())
    for one, other in zip(alone, neighbors, strict=True):
        assert not one.failures
        # Neighbors change the last bits of float32: about 1e-6 of a map's maximum.
        np.testing.assert_allclose(other.maps, one.maps, rtol=0, atol=NEIGHBORS * np.abs(one.maps).max())


class Faulty(torch.nn.Module):
    """Fails on the rows of a marked example, except the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_cnn()
        self.n_marked = 0

    def forward(self, x: Tensor) -> Tensor:
        marked = x[:, 0, 0, 0] > 50
        self.n_marked += int(marked.sum())
        outputs = self.inner(x)
        return outputs.masked_fill(marked[:, None], float("nan")) if self.n_marked > 3 else outputs

    def __deepcopy__(self, memo: dict[int, object]) -> "Faulty":
        return self


def test_an_example_that_fails_half_way_drops_its_rows_and_the_others_go_on(device: str, floats: Tensor) -> None:
    module = Faulty()
    floats[2, 0, 0, 0] = 200.0
    engine = Engine([ModelSpec(module)], Settings(device=device, max_chunk_rows=4))
    with engine:
        answer = asyncio.run(engine.attribute(Request(floats.numpy(), method=IntegratedGradients(steps=100))))
        assert [failure.example for failure in answer.failures] == [2]
        assert "not finite for example 2" in answer.failures[0].message
        assert module.n_marked < 50  # of its 100 rows
        good = [0, 1, 3, 4]
        expected = asyncio.run(engine.attribute(Request(floats[good].numpy(), method=IntegratedGradients(steps=100))))
    assert not expected.failures
    np.testing.assert_allclose(answer.maps[good], expected.maps, rtol=0, atol=NEIGHBORS * np.abs(expected.maps).max())
    assert np.isnan(answer.maps[2]).all()


@pytest.mark.parametrize("method", [TO_TOLERANCE, SmoothGrad(samples=100)], ids=["refined", "noise"])
def test_maps_that_improve_come_nearer_to_the_final_one(method: object, device: str, floats: Tensor) -> None:
    engine = Engine([ModelSpec(small_cnn())], Settings(device=device, max_chunk_rows=4))
    partial: list[Answer] = []

    async def run() -> Answer:
        improved, answered = asyncio.Event(), asyncio.Event()
        outcomes: list[Answer | Exception] = []

        def on_done(outcome: Answer | Exception) -> None:
            outcomes.append(outcome)
            improved.set()
            answered.set()

        request = Request(floats[:1].numpy(), method=method)
        submission = engine.submit(request, on_done, on_improved=improved.set)
        while not answered.is_set():
            await improved.wait()
            improved.clear()
            if newest := await submission.partial():
                partial.append(newest)
        (final,) = outcomes
        assert isinstance(final, Answer)
        return final

    with engine:
        final = asyncio.run(run())
    assert final.final
    assert len(partial) >= 3
    assert not any(each.final for each in partial)
    rows = [each.explanations[0].convergence.rows for each in partial if each.explanations[0]]
    assert rows == sorted(rows)
    away = [np.linalg.norm(each.maps - final.maps) for each in partial]
    assert away[-1] < 0.5 * away[0]


def test_partial_maps_cost_nothing_where_no_caller_requests_them(device: str, floats: Tensor) -> None:
    """SmoothGrad with a fixed number of draws runs them as one sweep, unless the caller requests partial maps."""
    module = Ordered()
    engine = tried(Engine([ModelSpec(module)], Settings(device=device, max_chunk_rows=64)), floats)
    module.chunks.clear()
    with engine:
        asyncio.run(engine.attribute(Request(floats[:1].numpy(), method=SmoothGrad(samples=40))))
    assert module.chunks == [1, 40]
