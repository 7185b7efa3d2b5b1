"""Admission: the share of a caller, and callers whose messages are refused."""

import asyncio

import pytest
from sidelight_server.errors import ResourceExhausted
from sidelight_server.rpc.limits import receive_limit
from sidelight_server.rpc.limits.admission import Admission
from sidelight_server.rpc.limits.receive_limit import LARGE_BYTES, REFUSED_BYTES_PER_S, Pace

from support.waiting import on_a_loop, settle


def held(admission: Admission) -> tuple[int, int]:
    return admission.n_requests, admission.n_bytes


@pytest.mark.parametrize("max_requests", range(1, 40))
def test_a_caller_alone_leaves_permits_for_others(max_requests: int) -> None:
    """At most about three quarters, and all where there are only one or two."""
    admission = Admission(max_requests=max_requests, max_bytes=10**6)
    n = 0
    while admission.try_acquire(1, "flood", n_rows=100):
        n += 1
    assert n // 3 <= max_requests - n
    assert (n + 1) // 3 > max_requests - n - 1
    others = range(max_requests - n)
    assert all(admission.try_acquire(1, f"other {each}", n_rows=100) for each in others)


def test_beside_many_rows_a_caller_has_room_for_a_few() -> None:
    admission = Admission(max_requests=256, max_bytes=10**6, max_caller_rows=10**6)
    while admission.try_acquire(10, "caller", n_rows=1_000):
        pass
    assert admission.n_requests == 192
    while admission.try_acquire(10, "caller", n_rows=64):
        pass
    assert admission.n_requests == 192 + 9  # of 16, of which 4 are for callers that hold at most one
    with pytest.raises(ResourceExhausted, match="max_in_flight 256"), admission.acquired(10, "caller"):
        pytest.fail("a third of what the caller has is to be free")
    assert admission.try_acquire(10, "other", n_rows=1_000)


def test_rows_of_a_caller_leave_room_for_small_requests() -> None:
    admission = Admission(max_requests=256, max_bytes=10**6, max_caller_rows=10_000)
    while admission.try_acquire(10, "caller", n_rows=1_000):
        pass
    assert admission.n_requests == 10
    assert admission.try_acquire(10, "caller", n_rows=64)
    assert not admission.try_acquire(10, "caller", n_rows=65)


def test_bytes_are_shared_out_as_permits_are() -> None:
    admission = Admission(max_requests=1000, max_bytes=1000)
    while admission.try_acquire(20, "flood"):
        pass
    assert admission.n_bytes == 740  # and 20 more would leave less than a third of them
    assert admission.try_acquire(200, "other")


def test_rows_of_one_caller_are_bounded_but_for_its_first_request() -> None:
    admission = Admission(max_requests=10, max_bytes=100, max_caller_rows=100)
    with admission.acquired(1, "a", n_rows=1000):
        with (
            pytest.raises(ResourceExhausted, match="max_caller_rows 100") as caught,
            admission.acquired(9, "a", n_rows=1),
        ):
            pytest.fail("there were rows enough")
        assert caught.value.retry_delay_s
        with admission.acquired(1, "b", n_rows=60), admission.acquired(1, "b", n_rows=40):
            assert admission.try_acquire(9, "b", n_rows=1) is None
    with admission.acquired(1, "a", n_rows=100):
        assert admission.n_requests == 1


@on_a_loop
async def test_callers_wait_in_turn_however_many_requests_one_has() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    permit = await admission.acquire(1, "first")
    came: list[str] = []

    async def wait(caller: str) -> None:
        permit = await admission.acquire(1, caller)
        came.append(caller)
        await asyncio.sleep(0)
        admission.release(permit)

    flood = [asyncio.create_task(wait("flood")) for _ in range(50)]
    await settle()
    good = [asyncio.create_task(wait("good")) for _ in range(2)]
    await settle()
    admission.release(permit)
    await asyncio.gather(*flood, *good)
    assert came[:5] == ["flood", "good", "flood", "good", "flood"]
    assert held(admission) == (0, 0)


@on_a_loop
async def test_a_request_that_waits_for_its_callers_share_delays_no_other_caller() -> None:
    admission = Admission(max_requests=8, max_bytes=100)
    permits = [await admission.acquire(1, "flood") for _ in range(6)]
    waiting = asyncio.create_task(admission.acquire(1, "flood"))
    await settle()
    assert not waiting.done()
    with admission.acquired(1, "other"), admission.acquired(1, "another"):
        assert not waiting.done()
    admission.release(permits[0])
    await waiting


@on_a_loop
async def test_a_small_request_that_waits_passes_a_large_one_of_the_same_caller() -> None:
    admission = Admission(max_requests=64, max_bytes=1600)
    running = admission.acquire_now(1100, "caller")
    large = asyncio.create_task(admission.acquire(600, "caller"))
    await settle()
    small = []
    while permit := admission.try_acquire(10, "caller"):
        small.append(permit)
    waiting = asyncio.create_task(admission.acquire(10, "caller"))
    await settle()
    assert not waiting.done()
    admission.release(small.pop())
    admission.release(await waiting)
    assert not large.done()
    for permit in (*small, running):
        admission.release(permit)
    admission.release(await large)
    assert (held(admission), admission.n_waiting) == ((0, 0), 0)


@on_a_loop
async def test_a_cancelled_request_makes_way_for_the_next_one_of_its_caller() -> None:
    admission = Admission(max_requests=3, max_bytes=1000)
    running = [admission.acquire_now(300, "other") for _ in range(2)]
    waiting = asyncio.create_task(admission.acquire(500, "caller"))
    await settle()
    following = asyncio.create_task(admission.acquire(20, "caller"))
    await settle()
    waiting.cancel()
    admission.release(await following)
    for permit in running:
        admission.release(permit)
    assert (held(admission), admission.n_waiting) == ((0, 0), 0)


@on_a_loop
async def test_a_caller_pays_for_large_refused_messages_and_catches_up() -> None:
    pace = Pace()
    pace.refuse("small", LARGE_BYTES - 1)
    pace.refuse("large", LARGE_BYTES)
    async with asyncio.timeout(0):  # cancels whatever waits
        await pace.wait("small")
        await pace.wait("other")
    began_s = asyncio.get_running_loop().time()
    await asyncio.gather(*(pace.wait("large") for _ in range(4)))
    assert asyncio.get_running_loop().time() - began_s >= 3.5 * LARGE_BYTES / REFUSED_BYTES_PER_S


def test_a_caller_is_not_delayed_for_long_after_its_last_refused_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive_limit, "FORGOTTEN_S", 0.05)

    async def refused() -> None:
        pace = Pace()
        for _ in range(100):
            pace.refuse("one", 64 * LARGE_BYTES)
        await asyncio.sleep(0.06)
        async with asyncio.timeout(0):
            await pace.wait("one")

    asyncio.run(refused())


@on_a_loop
async def test_callers_without_requests_are_forgotten_at_once() -> None:
    admission = Admission(max_requests=1, max_bytes=100)
    permit = await admission.acquire(100)
    first = asyncio.ensure_future(admission.acquire(100))
    await settle()
    for _ in range(5):
        leaving = asyncio.ensure_future(admission.acquire(50))
        await settle()
        leaving.cancel()
        await settle()
    assert sum(map(len, admission._waiting.values())) == 1
    admission.release(permit)
    admission.release(await first)


@pytest.mark.parametrize("n_rows", [1, 1_000])
def test_many_callers_that_fill_the_server_leave_room_for_a_later_one(n_rows: int) -> None:
    admission = Admission(max_requests=256, max_bytes=10**6, max_caller_rows=10**6)
    for rows in (n_rows, 1):  # 1: also from the reserve for small requests
        for _ in range(256):
            for connection in range(40):
                admission.try_acquire(10, f"connection {connection}", n_rows=rows)
    assert all(admission.try_acquire(10, f"late connection {n}", n_rows=n_rows) for n in range(2))
    assert admission.try_acquire(10, "another late connection", n_rows=1_000) is None
    assert all(admission.try_acquire(10, "good", n_rows=1) for _ in range(2))
