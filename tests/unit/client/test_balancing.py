"""Which server is chosen: by its reported backlog, by what was sent to it, and by its speed. No clock, no threads."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidelight._inputs.images import EncodedBatch
from sidelight._streaming.scheduling.dispatcher import CANDIDATES, Dispatcher
from sidelight._streaming.scheduling.parts import Entry
from sidelight._streaming.scheduling.resend_queue import ResendQueue
from sidelight._transport.balancing import EQUAL, FORGET_S, STALE_S, Load, least_loaded

A, B, C = "A", "B", "C"


def load(*, example_s: float = 0.1, backlog_s: float = 0.0, n_sent: int = 0, reported_s: float = 0.0) -> Load:
    known = Load()
    known.record(1, compute_s=example_s, backlog_s=backlog_s, now_s=reported_s)
    known.sent(n_sent)
    return known


@given(st.lists(st.tuples(st.floats(0.01, 1.0), st.floats(0.0, 5.0), st.integers(0, 50)), min_size=1, max_size=8))
def test_no_other_server_is_much_sooner_done_than_the_chosen_one(reported: list[tuple[float, float, int]]) -> None:
    loads = [load(example_s=each_s, backlog_s=backlog_s, n_sent=n) for each_s, backlog_s, n in reported]
    chosen = least_loaded(enumerate(loads), 4, now_s=0.5)
    finish_s = [max(backlog_s + n * each_s, n * each_s) + 4 * each_s for each_s, backlog_s, n in reported]
    assert finish_s[chosen] <= EQUAL * min(finish_s) * (1 + 1e-9)


def test_a_backlog_counts_as_reported_for_a_second_and_then_as_the_average() -> None:
    busy = load(backlog_s=1.0)
    busy.record(1, compute_s=0.1, backlog_s=6.0, now_s=0.0)
    waits_s = [busy.finish_s(0, now_s, unknown_s=1.0) for now_s in (0.0, STALE_S - 0.01, STALE_S, FORGET_S)]
    assert waits_s == [6.0, 6.0, pytest.approx(2.0), 0.0]


def test_requests_sent_since_the_last_report_are_added_to_the_backlog() -> None:
    known = load(example_s=0.5, backlog_s=2.0)
    known.sent(4)
    assert known.finish_s(2, 0.0, unknown_s=9.0) == 2.0 + 4 * 0.5 + 2 * 0.5
    known.ended(4)
    assert known.finish_s(2, 0.0, unknown_s=9.0) == 2.0 + 2 * 0.5


def test_a_new_server_is_assumed_as_fast_as_the_fastest_and_not_flooded() -> None:
    loads = {A: load(example_s=0.1), B: load(example_s=0.4), C: Load()}
    n_sent = dict.fromkeys(loads, 0)
    for _ in range(90):
        chosen = least_loaded(loads.items(), 1, now_s=0.0)
        loads[chosen].sent(1)
        n_sent[chosen] += 1
    assert n_sent[C] == pytest.approx(n_sent[A], rel=EQUAL - 1)
    assert n_sent[B] < n_sent[A] / 2


def dispatched(loads: dict[str, Load], n_batches: int) -> Dispatcher:
    queue = ResendQueue(window=100)
    dispatcher = Dispatcher(queue)
    for worker, known in loads.items():
        queue.add_worker(worker, known)
        dispatcher.add_idle(worker)
    for index in range(n_batches):
        queue.add(Entry(index, EncodedBatch(np.zeros((1, 1, 1, 1), np.float32)), 1e9), [range(1)])
    return dispatcher


def test_a_part_goes_to_the_idle_worker_whose_server_is_done_first() -> None:
    dispatcher = dispatched({A: load(backlog_s=3.0), B: load(backlog_s=1.0), C: load(backlog_s=2.0)}, 3)
    for worker in (B, C, A):
        assert [each for each in (A, B, C) if dispatcher.next_to_send(0.0) == each] == [worker]
        assert dispatcher.take(worker, 0.0) is not None
    assert dispatcher.next_to_send(0.0) is None


def test_a_choice_holds_until_the_worker_has_acted_or_left() -> None:
    loads = {A: load(backlog_s=1.0), B: load(backlog_s=2.0)}
    dispatcher = dispatched(loads, 1)
    assert dispatcher.next_to_send(0.0) == A
    loads[A].sent(1000)
    assert dispatcher.next_to_send(0.0) == A  # otherwise each of the two might wait for the other
    assert dispatcher.take(B, 0.0) is None
    dispatcher.leave(A)
    assert dispatcher.take(B, 0.0) is not None


def test_a_worker_without_shared_memory_leaves_the_part_to_another() -> None:
    dispatcher = dispatched({A: load(backlog_s=1.0), B: load(backlog_s=2.0)}, 1)
    assert dispatcher.take(A, 0.0, fits=lambda _: False) is None
    assert dispatcher.next_to_send(0.0) == B
    dispatcher.leave(B)
    assert dispatcher.next_to_send(0.0) is None
    dispatcher.unblock(A)
    assert dispatcher.take(A, 0.0) is not None


def test_each_of_many_equal_workers_is_sent_some() -> None:
    loads = {f"worker {i}": load() for i in range(5 * CANDIDATES)}
    dispatcher, n_sent = dispatched(loads, len(loads)), dict.fromkeys(loads, 0)
    while (worker := dispatcher.next_to_send(0.0)) is not None:
        dispatcher.take(worker, 0.0)
        dispatcher.add_idle(worker)
        n_sent[worker] += 1
    assert set(n_sent.values()) == {1}


def test_scheduling_needs_the_standard_library_alone() -> None:
    code = """
import sys, types, pathlib
root = pathlib.Path(sys.argv[1])
for name in ("sidelight", "sidelight._transport", "sidelight._streaming"):  # without what their __init__ import
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [str(root / name.replace(".", "/"))]
import sidelight._streaming.scheduling.dispatcher
print([each for each in ("numpy", "grpc", "google", "PIL") if each in sys.modules])
"""
    import sidelight

    root = sidelight.__path__[0].removesuffix("sidelight")
    run = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
