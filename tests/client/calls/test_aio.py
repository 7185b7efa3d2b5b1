"""The asyncio client: it returns what `Client` returns, never blocks the loop, and passes on cancellation."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import sidelight
import sidelight_server
from sidelight.v1 import attribution_pb2 as pb

from support.models.gate import Gate, Gated
from support.servers.scripted import Ended, answer, scripted

WAIT_S = 30


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, WAIT_S))


def floats(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def gated(gate: Gate, device: str) -> Iterator[str]:
    with sidelight_server.serve(Gated(gate), device=device, max_chunk_rows=1, drain_s=0) as address:
        yield address
        gate.open()


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, WAIT_S)


def test_the_asynchronous_client_gives_the_same_answers(address: str, client: sidelight.Client) -> None:
    async def ask() -> tuple[object, ...]:
        async with sidelight.aio.connect(address) as asked:
            assert asked.address == address
            one = await asked.attribute(floats(2), target=[1, 2], channels="none", probabilities=True)
            many = [each async for each in asked.stream([floats(2, i) for i in range(20)], ordered=True)]
            return one, many, await asked.info(), await asked.model("small")

    one, many, info, model = run(ask())
    expected = client.attribute(floats(2), target=[1, 2], channels="none", probabilities=True)
    assert one.maps.tobytes() == expected.maps.tobytes()
    assert one.provenance == expected.provenance
    assert [each.index for each in many] == list(range(20))
    for i in (0, 19):
        np.testing.assert_allclose(many[i].maps, client.attribute(floats(2, i)).maps, rtol=0, atol=1e-6)
    assert (info, model) == (client.info(), client.model("small"))


def test_calls_of_many_tasks_run_side_by_side(address: str) -> None:
    async def ask() -> list[sidelight.Attribution]:
        async with sidelight.aio.connect(address) as client:
            return await asyncio.gather(*(client.attribute(floats(1, i)) for i in range(40)))

    answers = run(ask())
    assert len({each.maps.tobytes() for each in answers}) == 40


def test_the_asynchronous_client_raises_the_same_errors(address: str) -> None:
    async def ask(images: object, **options: object) -> None:
        async with sidelight.aio.connect(address) as client:
            await client.attribute(images, **options)

    for images, options, error in (
        (floats(1), {"target": 99}, sidelight.InvalidArgument),
        (floats(1), {"model": "smal"}, sidelight.NotFound),
        (floats(1), {"on_error": "shout"}, sidelight.InvalidArgument),
        ("absent.png", {}, OSError),
        (b"no picture", {}, sidelight.PartialFailure),
    ):
        with pytest.raises(error):
            run(ask(images, **options))


def test_without_a_server_a_call_ends_at_connect_timeout() -> None:
    async def ask() -> None:
        async with sidelight.aio.connect("unix:/nowhere/absent", connect_timeout=0.2) as client:
            await client.attribute(floats(1))

    with pytest.raises(sidelight.Unavailable, match="no server answers"):
        run(ask())


def test_an_asynchronous_iterable_is_read_in_the_loop_and_no_further_than_the_window(gate: Gate, gated: str) -> None:
    loops, n_read = set(), 0

    async def batches() -> AsyncIterator[np.ndarray]:
        nonlocal n_read
        for i in range(50):
            loops.add(asyncio.get_running_loop())
            n_read += 1
            yield floats(1, i)

    async def ask() -> int:
        async with sidelight.aio.connect(gated) as client:
            gate.shut()
            answers = client.stream(batches(), window=4)
            first = asyncio.ensure_future(anext(answers))
            await until(gate.reached)
            for _ in range(20):  # time enough for a reader that does not stop
                await asyncio.sleep(0.01)
            held = n_read
            gate.open()
            await first
            assert len([each async for each in answers]) == 49
            assert loops == {asyncio.get_running_loop()}
            return held

    assert run(ask()) <= 4
    assert n_read == 50


def test_the_loop_goes_on_while_a_batch_is_read_or_explained(gate: Gate, gated: str) -> None:
    released = threading.Event()

    def batches() -> Iterator[np.ndarray]:
        assert released.wait(WAIT_S)  # an ordinary iterable that blocks
        yield floats(1)

    async def ask() -> None:
        async with sidelight.aio.connect(gated) as client:
            gate.shut()
            call = asyncio.ensure_future(client.attribute(floats(1)))
            streamed = asyncio.ensure_future(anext(client.stream(batches())))
            await until(gate.reached)
            released.set()
            gate.open()
            assert len(await call) == len(await streamed) == 1

    run(ask())


def test_cancelling_a_task_frees_its_work_on_the_server(gate: Gate, gated: str) -> None:
    async def ask() -> None:
        async with sidelight.aio.connect(gated) as client:
            gate.shut()
            call = asyncio.ensure_future(client.attribute(floats(1000), timeout=3600))
            await until(gate.reached)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            gate.open()
            assert len(await client.attribute(floats(1), timeout=WAIT_S)) == 1
            assert gate.n_rows < 1000

    run(ask())


def test_leaving_a_stream_early_ends_it(gate: Gate, gated: str) -> None:
    async def ask() -> None:
        async with sidelight.aio.connect(gated) as client:
            async with contextlib.aclosing(client.stream(floats(1, i) for i in range(10_000))) as answers:
                async for _ in answers:
                    break
            assert not any(each.name in ("sidelight-receive", "sidelight-timer") for each in threading.enumerate())
            assert len(await client.attribute(floats(1), timeout=WAIT_S)) == 1

    run(ask())


def test_a_stream_ends_although_its_task_is_cancelled_again_and_no_thread_is_free(gate: Gate, gated: str) -> None:
    """As under anyio, whose scopes cancel at every await."""
    is_free = threading.Event()

    async def consume(client: sidelight.AsyncClient) -> None:
        async for _ in client.stream([floats(1)]):
            pass

    async def ask() -> None:
        executor = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(executor)
        async with sidelight.aio.connect(gated) as client:
            gate.shut()
            task = asyncio.ensure_future(consume(client))
            while not gate.reached.is_set():  # noqa: ASYNC110  (the only thread has other work)
                await asyncio.sleep(0.01)
            blocked = executor.submit(is_free.wait, WAIT_S)
            while not task.done():
                task.cancel()
                await asyncio.sleep(0)
            is_free.set()
            gate.open()
            assert await asyncio.wrap_future(blocked)
            await asyncio.to_thread(lambda: None)  # behind the end of the stream
            assert not any(each.name in ("sidelight-receive", "sidelight-timer") for each in threading.enumerate())

    run(ask())


def test_an_exception_in_the_callers_iterable_is_raised_by_the_stream(address: str) -> None:
    async def batches() -> AsyncIterator[np.ndarray]:
        yield floats(1)
        raise KeyError("mine")

    async def ask() -> None:
        async with sidelight.aio.connect(address) as client:
            async for _ in client.stream(batches()):
                pass

    with pytest.raises(KeyError, match="mine"):
        run(ask())


def test_a_stream_continues_after_its_server_ends_a_call() -> None:
    def dying(requests: Iterator[pb.AttributeStreamRequest]) -> Iterator[pb.AttributeStreamResponse]:
        yield answer(next(requests))
        raise Ended(grpc.StatusCode.UNAVAILABLE, "cut")

    def living(requests: Iterator[pb.AttributeStreamRequest]) -> Iterator[pb.AttributeStreamResponse]:
        yield from map(answer, requests)

    async def ask(address: str) -> list[int]:
        async with sidelight.aio.connect(address) as client:
            images = np.zeros((1, 3, 2, 2), np.float32)
            return [each.index async for each in client.stream([images] * 30, ordered=True)]

    with scripted(dying, living) as address:
        assert run(ask(address)) == list(range(30))


def test_a_closed_client_is_unavailable(address: str) -> None:
    async def ask() -> None:
        client = sidelight.aio.connect(address)
        await client.attribute(floats(1))
        await client.close()
        await client.attribute(floats(1))

    with pytest.raises(sidelight.Unavailable, match="closed"):
        run(ask())
