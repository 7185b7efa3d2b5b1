"""Admission: permits by count and by bytes, first come, first served, and none is lost."""

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sidelight_server.admission import Admission
from sidelight_server.errors import ResourceExhausted


def on_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 10))

    return run


async def settle() -> None:
    """Let every task go as far as it can: each step here wakes at most the next one."""
    for _ in range(10):
        await asyncio.sleep(0)


def held(admission: Admission) -> tuple[int, int]:
    return admission.n_requests, admission.n_bytes


def test_a_permit_is_held_inside_and_given_back_outside() -> None:
    admission = Admission(max_requests=2, max_bytes=100)
    with admission.enter(60):
        assert held(admission) == (1, 60)
        with admission.enter(40):
            assert held(admission) == (2, 100)
        assert held(admission) == (1, 60)
    assert held(admission) == (0, 0)


def test_a_permit_is_given_back_when_something_goes_wrong() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    with pytest.raises(ZeroDivisionError), admission.enter(60):
        raise ZeroDivisionError
    assert held(admission) == (0, 0)


@pytest.mark.parametrize(
    ("max_requests", "max_bytes"), [(1, 1000), (10, 100)], ids=["over the count", "over the bytes"]
)
def test_over_the_permits_entering_is_refused_with_a_delay(max_requests: int, max_bytes: int) -> None:
    admission = Admission(max_requests=max_requests, max_bytes=max_bytes)
    with admission.enter(60):
        with pytest.raises(ResourceExhausted) as caught, admission.enter(60):
            pytest.fail("there was no room")
        assert held(admission) == (1, 60)
    assert caught.value.retry_delay_s > 0
    assert f"max_in_flight {max_requests}" in caught.value.message
    assert f"max_in_flight_bytes {max_bytes}" in caught.value.message
    with admission.enter(60):
        pass


@on_a_loop
async def test_what_can_never_fit_is_refused_at_once() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    with pytest.raises(ResourceExhausted, match="send fewer examples") as entering, admission.enter(101):
        pytest.fail("there was no room")
    with pytest.raises(ResourceExhausted, match="101 bytes") as acquiring:
        await admission.acquire(101)
    # Asking again is of no use.
    assert entering.value.retry_delay_s is None
    assert acquiring.value.retry_delay_s is None
    assert held(admission) == (0, 0)


@on_a_loop
async def test_all_there_is_can_be_had_by_one() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    await admission.acquire(100)
    assert held(admission) == (1, 100)
    admission.release(100)
    assert held(admission) == (0, 0)


@on_a_loop
async def test_those_who_wait_are_served_in_order() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    await admission.acquire(1)
    came: list[int] = []

    async def wait(n: int) -> None:
        await admission.acquire(1)
        came.append(n)

    waiting = [asyncio.create_task(wait(n)) for n in range(4)]
    await settle()
    assert came == []
    for n in range(4):
        admission.release(1)
        await settle()
        assert came == list(range(n + 1))
        assert held(admission) == (1, 1)
    await asyncio.gather(*waiting)
    admission.release(1)
    assert held(admission) == (0, 0)


@on_a_loop
async def test_a_small_one_does_not_overtake_a_large_one_that_waits() -> None:
    """Or else a stream of small batches would starve a large one."""
    admission = Admission(max_requests=10, max_bytes=100)
    await admission.acquire(60)
    large = asyncio.create_task(admission.acquire(80))
    await settle()
    small = asyncio.create_task(admission.acquire(10))
    await settle()
    assert not small.done()
    with pytest.raises(ResourceExhausted), admission.enter(10):
        pytest.fail("it went before those who wait")
    admission.release(60)
    await settle()
    assert large.done()
    assert small.done()
    assert held(admission) == (2, 90)


@on_a_loop
async def test_one_release_may_serve_many() -> None:
    admission = Admission(max_requests=10, max_bytes=100)
    await admission.acquire(100)
    waiting = [asyncio.create_task(admission.acquire(30)) for _ in range(4)]
    await settle()
    admission.release(100)
    await settle()
    assert [each.done() for each in waiting] == [True, True, True, False]
    assert held(admission) == (3, 90)
    admission.release(30)
    await waiting[3]
    assert held(admission) == (3, 90)


@on_a_loop
async def test_one_who_leaves_before_waiting_takes_nothing() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    leaving = asyncio.create_task(admission.acquire(1))
    leaving.cancel()
    await settle()
    assert leaving.cancelled()
    assert held(admission) == (0, 0)


@on_a_loop
async def test_one_who_leaves_while_waiting_takes_nothing() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    await admission.acquire(1)
    leaving, staying = (asyncio.create_task(admission.acquire(1)) for _ in range(2))
    await settle()
    leaving.cancel()
    await settle()
    assert leaving.cancelled()
    assert held(admission) == (1, 1)
    admission.release(1)
    await staying
    assert held(admission) == (1, 1)


@on_a_loop
async def test_one_who_leaves_in_the_moment_of_the_turn_passes_it_on() -> None:
    """The permit was taken, and the task that was to get it is cancelled before it runs."""
    admission = Admission(max_requests=1, max_bytes=100)
    await admission.acquire(1)
    leaving, staying = (asyncio.create_task(admission.acquire(1)) for _ in range(2))
    await settle()
    admission.release(1)
    leaving.cancel()
    await settle()
    assert leaving.cancelled()
    assert staying.done()
    assert held(admission) == (1, 1)


@on_a_loop
async def test_one_who_leaves_just_before_the_turn_passes_it_on() -> None:
    """The waiting task is cancelled, and the permit comes free before it has noticed."""
    admission = Admission(max_requests=1, max_bytes=100)
    await admission.acquire(1)
    leaving, staying = (asyncio.create_task(admission.acquire(1)) for _ in range(2))
    await settle()
    leaving.cancel()
    admission.release(1)
    await settle()
    assert leaving.cancelled()
    assert staying.done()
    assert held(admission) == (1, 1)


@on_a_loop
async def test_a_large_one_who_leaves_makes_way_for_small_ones() -> None:
    admission = Admission(max_requests=10, max_bytes=100)
    await admission.acquire(60)
    large = asyncio.create_task(admission.acquire(80))
    await settle()
    small = asyncio.create_task(admission.acquire(40))
    await settle()
    large.cancel()
    await settle()
    assert small.done()
    assert held(admission) == (2, 100)


@on_a_loop
async def test_a_time_limit_on_waiting_takes_nothing() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    with admission.enter(1):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(admission.acquire(1), timeout=0.01)
        assert held(admission) == (1, 1)
    assert held(admission) == (0, 0)


STEPS = st.lists(
    st.tuples(st.sampled_from(["acquire", "acquire", "release", "cancel", "settle"]), st.integers(1, 10)), max_size=40
)


@settings(deadline=None)
@given(steps=STEPS)
def test_no_permit_is_lost_or_given_twice(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        admission = Admission(max_requests=3, max_bytes=12)
        waiting: list[tuple[int, asyncio.Task[None]]] = []
        for step, size in steps:
            match step:
                case "acquire":
                    waiting.append((size, asyncio.create_task(admission.acquire(size))))
                case "release":
                    holder = next((each for each in waiting if each[1].done() and not each[1].cancelled()), None)
                    if holder is not None:
                        waiting.remove(holder)
                        admission.release(holder[0])
                case "cancel" if waiting:
                    waiting[size % len(waiting)][1].cancel()
                case "settle":
                    await settle()
            assert 0 <= admission.n_requests <= 3
            assert 0 <= admission.n_bytes <= 12
        await settle()
        for size, task in waiting:  # in order: each release serves those who came next
            await settle()
            assert task.done(), "someone waits though there is room"
            if not task.cancelled():
                admission.release(size)
        assert held(admission) == (0, 0)

    asyncio.run(play())
