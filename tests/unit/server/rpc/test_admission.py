"""Admission: permits by count and bytes, in order of arrival, and none is lost."""

import asyncio

import numpy as np
import pytest
import sidelight_server
from hypothesis import given
from hypothesis import strategies as st
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2
from sidelight_server.errors import ResourceExhausted
from sidelight_server.rpc.limits.admission import Admission, Permit
from sidelight_server.rpc.request_handler import RequestHandler
from sidelight_server.telemetry.call_record import CallRecord

from support.waiting import on_a_loop, settle


def held(admission: Admission) -> tuple[int, int]:
    return admission.n_requests, admission.n_bytes


def test_a_permit_is_held_inside_the_with_block_and_released_after_it() -> None:
    admission = Admission(max_requests=2, max_bytes=100)
    with admission.acquired(60, "a"):
        assert held(admission) == (1, 60)
        with admission.acquired(40, "b"):
            assert held(admission) == (2, 100)
        assert held(admission) == (1, 60)
    assert held(admission) == (0, 0)


def test_a_permit_is_released_after_an_exception() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    with pytest.raises(ZeroDivisionError), admission.acquired(60):
        raise ZeroDivisionError
    assert held(admission) == (0, 0)


@pytest.mark.parametrize(
    ("max_requests", "max_bytes"), [(1, 1000), (10, 100)], ids=["over the count", "over the bytes"]
)
def test_over_the_permits_entering_is_refused_with_a_delay(max_requests: int, max_bytes: int) -> None:
    admission = Admission(max_requests=max_requests, max_bytes=max_bytes)
    with admission.acquired(60):
        with pytest.raises(ResourceExhausted) as caught, admission.acquired(60):
            pytest.fail("there was no room")
        assert held(admission) == (1, 60)
    assert caught.value.retry_delay_s > 0
    assert f"max_in_flight {max_requests}" in caught.value.message
    assert f"max_in_flight_bytes {max_bytes}" in caught.value.message
    with admission.acquired(60):
        pass


@on_a_loop
async def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    with pytest.raises(ResourceExhausted, match="send fewer examples") as entering, admission.acquired(101):
        pytest.fail("there was no room")
    with pytest.raises(ResourceExhausted, match="101 bytes") as acquiring:
        await admission.acquire(101)
    # Asking again is of no use.
    assert entering.value.retry_delay_s is None
    assert acquiring.value.retry_delay_s is None
    assert held(admission) == (0, 0)


@on_a_loop
async def test_one_request_may_take_all_bytes() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    permit = await admission.acquire(100)
    assert held(admission) == (1, 100)
    admission.release(permit)
    assert held(admission) == (0, 0)


@on_a_loop
async def test_waiting_requests_are_served_in_order() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    permits = [await admission.acquire(1)]

    async def wait() -> None:
        permits.append(await admission.acquire(1))

    waiting = [asyncio.create_task(wait()) for _ in range(4)]
    await settle()
    assert len(permits) == 1
    for n in range(4):
        admission.release(permits[n])
        await settle()
        assert [each.done() for each in waiting] == [place <= n for place in range(4)]
        assert held(admission) == (1, 1)
    admission.release(permits[4])
    assert held(admission) == (0, 0)


@on_a_loop
async def test_a_request_that_is_not_small_does_not_overtake_a_large_one_that_waits() -> None:
    """Otherwise a stream of smaller batches would starve a large one."""
    admission = Admission(max_requests=10, max_bytes=100)
    permit = await admission.acquire(60, "a")
    large = asyncio.create_task(admission.acquire(80, "b"))
    await settle()
    smaller = asyncio.create_task(admission.acquire(10, "c"))
    await settle()
    assert not smaller.done()
    with pytest.raises(ResourceExhausted), admission.acquired(10, "d"):
        pytest.fail("it went before those who wait")
    admission.release(permit)
    await settle()
    assert large.done()
    assert smaller.done()
    assert held(admission) == (2, 90)


@on_a_loop
async def test_small_requests_pass_a_large_one_that_waits_and_do_not_delay_it() -> None:
    admission = Admission(max_requests=100, max_bytes=6400)  # small: 100; kept for those: 400
    permit = await admission.acquire(5000, "a")
    large = asyncio.create_task(admission.acquire(6400, "b"))
    await settle()
    passing = [await admission.acquire(100, caller) for caller in "cdef"]
    with pytest.raises(ResourceExhausted), admission.acquired(1, "g"):
        pytest.fail("the reserve is full")
    assert held(admission) == (5, 5400)
    admission.release(permit)
    await large
    assert held(admission) == (5, 6800)
    for each in (*passing, large.result()):
        admission.release(each)
    assert held(admission) == (0, 0)


@on_a_loop
async def test_one_release_may_serve_many() -> None:
    admission = Admission(max_requests=10, max_bytes=100)
    permit = await admission.acquire(100, "a")
    waiting = [asyncio.create_task(admission.acquire(30, caller)) for caller in "bcde"]
    await settle()
    admission.release(permit)
    await settle()
    assert [each.done() for each in waiting] == [True, True, True, False]
    assert held(admission) == (3, 90)
    admission.release(waiting[0].result())
    await waiting[3]
    assert held(admission) == (3, 90)


@on_a_loop
async def test_a_request_cancelled_before_it_waits_takes_no_permit() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    leaving = asyncio.create_task(admission.acquire(1))
    leaving.cancel()
    await settle()
    assert leaving.cancelled()
    assert held(admission) == (0, 0)


@on_a_loop
async def test_a_request_cancelled_while_it_waits_takes_no_permit() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    permit = await admission.acquire(1)
    leaving, staying = (asyncio.create_task(admission.acquire(1)) for _ in range(2))
    await settle()
    leaving.cancel()
    await settle()
    assert leaving.cancelled()
    assert held(admission) == (1, 1)
    admission.release(permit)
    await staying
    assert held(admission) == (1, 1)


@on_a_loop
async def test_a_task_cancelled_as_it_gets_its_permit_passes_it_on() -> None:
    """The permit was granted, and the task that waits for it is cancelled before it runs."""
    admission = Admission(max_requests=1, max_bytes=100)
    permit = await admission.acquire(1)
    leaving, staying = (asyncio.create_task(admission.acquire(1)) for _ in range(2))
    await settle()
    admission.release(permit)
    leaving.cancel()
    await settle()
    assert leaving.cancelled()
    assert staying.done()
    assert held(admission) == (1, 1)


@on_a_loop
async def test_a_task_cancelled_just_before_it_gets_its_permit_passes_it_on() -> None:
    """The waiting task is cancelled, and the permit is released before the task has run."""
    admission = Admission(max_requests=1, max_bytes=100)
    permit = await admission.acquire(1)
    leaving, staying = (asyncio.create_task(admission.acquire(1)) for _ in range(2))
    await settle()
    leaving.cancel()
    admission.release(permit)
    await settle()
    assert leaving.cancelled()
    assert staying.done()
    assert held(admission) == (1, 1)


@on_a_loop
async def test_a_cancelled_large_request_makes_way_for_small_ones() -> None:
    admission = Admission(max_requests=10, max_bytes=100)
    await admission.acquire(60, "a")
    large = asyncio.create_task(admission.acquire(80, "b"))
    await settle()
    small = asyncio.create_task(admission.acquire(40, "c"))
    await settle()
    large.cancel()
    await settle()
    assert small.done()
    assert held(admission) == (2, 100)


@on_a_loop
async def test_a_timeout_while_waiting_takes_no_permit() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    with admission.acquired(1):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(admission.acquire(1), timeout=0.01)
        assert held(admission) == (1, 1)
    assert held(admission) == (0, 0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "take", "release", "cancel", "settle"]),
        st.integers(1, 120),
        st.sampled_from("abc"),
    ),
    max_size=40,
)


@given(steps=STEPS)
def test_no_permit_is_lost_or_given_twice(steps: list[tuple[str, int, str]]) -> None:
    async def play() -> None:
        admission = Admission(max_requests=16, max_bytes=128)  # small: 2; kept for those: 1 of 8
        waiting: list[asyncio.Task[Permit]] = []
        permits: list[Permit] = []
        for step, size, caller in steps:
            match step:
                case "acquire":
                    waiting.append(asyncio.create_task(admission.acquire(max(1, size // 10), caller)))
                case "take":
                    if permit := admission.try_acquire(size, caller):
                        permits.append(permit)
                case "release" if permits:
                    admission.release(permits.pop(size % len(permits)))
                case "cancel" if waiting:
                    waiting[size % len(waiting)].cancel()
                case "settle":
                    await settle()
            permits += [each.result() for each in waiting if each.done() and not each.cancelled()]
            waiting = [each for each in waiting if not each.done()]
            assert 0 <= admission.n_requests <= 16 + 1
            assert 0 <= admission.n_bytes <= 128 + 8
        while permits or waiting:
            await settle()
            permits += [each.result() for each in waiting if each.done() and not each.cancelled()]
            waiting = [each for each in waiting if not each.done()]
            assert permits or not waiting, "someone waits though there is room"
            if permits:
                admission.release(permits.pop())
        assert held(admission) == (0, 0)

    asyncio.run(play())


def test_a_permit_counts_a_message_its_parsed_copy_its_maps_and_those_as_they_are_sent(
    spec: sidelight_server.ModelSpec,
) -> None:
    images = np.zeros((9, 3, 32, 32), np.float32)
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=images.shape)
    target = pb.Target(predicted=pb.PredictedTarget())
    cut = pb.AttributeRequest(images=tensor_pb2.Images(tensor=tensor), target=target)
    cut.method.gradient.SetInParent()
    whole = pb.AttributeRequest()
    whole.CopyFrom(cut)
    whole.images.tensor.data = images.tobytes()

    async def permits() -> list[int]:
        with sidelight_server.Engine([spec], sidelight_server.Settings(device="cpu")) as engine:
            handler = RequestHandler(engine)
            n_bytes = whole.ByteSize()
            inquiries = [
                await handler.validate(each, n_bytes=n_bytes, data=data, call_record=CallRecord("Attribute", 0.0))
                for each, data in ((cut, memoryview(images).cast("B")), (whole, None))
            ]
            return [each.n_bytes for each in inquiries]

    without_copy, with_copy = asyncio.run(permits())
    assert with_copy - without_copy == whole.ByteSize()
    assert without_copy >= whole.ByteSize() + 2 * 9 * 32 * 32 * 4
