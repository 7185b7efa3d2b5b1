"""The fair thread pool: callers take turns, cancelled work is dropped, and closing fails what waits."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidelight_server.engine.preparation.fair_thread_pool import FairThreadPool
from sidelight_server.errors import Unavailable

UNTIL_S = 60.0


@pytest.fixture
def pool() -> Iterator[FairThreadPool]:
    pool = FairThreadPool(1, name="test")
    yield pool
    pool.close(wait=True)


def occupied(pool: FairThreadPool) -> Callable[[], None]:
    """Occupy the pool's only thread, and return what frees it."""
    begun, free = threading.Event(), threading.Event()

    def occupy() -> None:
        begun.set()
        free.wait(UNTIL_S)

    pool.submit("first", occupy)
    assert begun.wait(UNTIL_S)
    return free.set


@given(st.lists(st.sampled_from("abc")))
def test_callers_take_turns_and_the_work_of_one_keeps_its_order(callers: list[str]) -> None:
    pool, done = FairThreadPool(1, name="test"), list[tuple[str, int]]()
    free = occupied(pool)
    futures = [pool.submit(each, lambda work=(each, n): done.append(work)) for n, each in enumerate(callers)]
    free()
    for each in futures:
        each.result(UNTIL_S)
    pool.close(wait=True)
    assert sorted(done, key=lambda work: work[1]) == list(zip(callers, range(len(callers)), strict=True))
    for caller in set(callers):
        of_caller = [n for name, n in done if name == caller]
        assert of_caller == sorted(of_caller)
    # While a caller has work waiting, no other one is served twice.
    for index, (caller, n) in enumerate(done):
        before = [name for name, _ in done[:index]]
        last = len(before) - 1 - before[::-1].index(caller) if caller in before else -1
        assert len(set(before[last + 1 :])) == len(before[last + 1 :]), (done, n)


def test_work_that_fails_drops_what_it_held_at_once(pool: FairThreadPool) -> None:
    class Message:
        pass

    left: list[weakref.ref[Message]] = []

    def fail() -> None:
        message = Message()
        left.append(weakref.ref(message))
        raise ValueError(id(message))

    gc.collect()
    gc.disable()
    try:
        assert isinstance(pool.submit("first", fail).exception(UNTIL_S), ValueError)
        pool.submit("first", int).result(UNTIL_S)  # the thread has left the work before
        assert left[0]() is None
    finally:
        gc.enable()


def test_cancelled_work_is_dropped_at_once_with_what_it_holds(pool: FairThreadPool) -> None:
    class Message:
        pass

    free = occupied(pool)
    message = Message()
    dropped = weakref.ref(message)
    future: Future[str] = pool.submit("a", lambda message=message: repr(message))
    del message
    assert dropped() is not None
    assert future.cancel()
    assert dropped() is None
    later = pool.submit("a", lambda: "done")
    free()
    assert later.result(UNTIL_S) == "done"


def test_an_exception_is_the_result_and_the_thread_continues(pool: FairThreadPool) -> None:
    assert isinstance(pool.submit("a", lambda: 1 // 0).exception(UNTIL_S), ZeroDivisionError)
    assert pool.submit("a", lambda: 1).result(UNTIL_S) == 1


def test_closing_fails_what_waits_and_takes_nothing_more() -> None:
    pool = FairThreadPool(1, name="test")
    free = occupied(pool)
    waiting = [pool.submit(caller, lambda: None) for caller in "aab"]
    pool.close()
    assert all(isinstance(each.exception(UNTIL_S), Unavailable) for each in waiting)
    with pytest.raises(Unavailable):
        pool.submit("a", lambda: None)
    free()
    pool.close(wait=True)
