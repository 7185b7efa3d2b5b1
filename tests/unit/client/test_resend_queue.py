"""Unanswered parts: which are sent, sent again, sent alone and given up. These tests need no clock and no threads."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidelight._inputs.images import EncodedBatch
from sidelight._streaming.scheduling.parts import Entry, Part
from sidelight._streaming.scheduling.resend_queue import GRACE_S, ResendQueue
from sidelight.exceptions import Internal
from sidelight.results import attribution

A, B = "worker A", "worker B"


def entry(index: int, n: int = 1, *, deadline_s: float = 100.0) -> Entry:
    return Entry(index, EncodedBatch(np.zeros((n, 1, 1, 1), np.float32)), deadline_s)


def filled(
    n_batches: int, *, window: int = 100, workers: Sequence[str] = (A,), hedge_after_s: float | None = None
) -> ResendQueue:
    queue = ResendQueue(window=window, hedge_after_s=hedge_after_s)
    for worker in workers:
        queue.add_worker(worker)
    for index in range(n_batches):
        queue.add(entry(index), [range(1)])
    return queue


def sent(queue: ResendQueue, worker: str, now_s: float = 0.0) -> list[str]:
    """Send a worker all parts that it may have."""
    ids = []
    while (part := queue.send(worker, now_s)) is not None:
        ids.append(part.id)
    return ids


def test_parts_are_sent_in_the_order_of_their_batches() -> None:
    assert sent(filled(3), A) == ["0", "1", "2"]


def test_a_batch_in_parts_is_sent_as_spans_that_cover_it() -> None:
    queue = filled(0, window=10)
    queue.add(entry(4, 5), [range(2), range(2, 4), range(4, 5)])
    assert sent(queue, A) == ["4:0-2", "4:2-4", "4:4-5"]
    assert [len(queue.get(id_).batch) for id_ in ("4:0-2", "4:2-4", "4:4-5")] == [2, 2, 1]


def test_an_answer_is_delivered_once() -> None:
    queue = filled(1)
    sent(queue, A)
    assert queue.pop("0").id == "0"
    assert queue.pop("0") is None
    assert queue.get("0") is None


def test_what_a_worker_had_sent_when_its_call_ended_in_order_is_sent_again_before_what_came_later() -> None:
    queue = filled(3)
    sent(queue, A)
    assert queue.requeue_after_call_end(A, died=False) == []
    queue.add(entry(3), [range(1)])
    assert sent(queue, A) == ["0", "1", "2", "3"]


def test_what_a_server_held_when_it_died_is_sent_alone() -> None:
    queue = filled(3)
    sent(queue, A)
    queue.requeue_after_call_end(A, died=True)
    for id_ in ("0", "1", "2"):
        assert sent(queue, A) == [id_]
        assert not queue.may_read(A, 0.0)
        queue.pop(id_)
    assert queue.may_read(A, 0.0)


def test_a_worker_answers_everything_before_it_is_sent_a_suspect_and_another_continues() -> None:
    queue = filled(2, workers=(A, B))
    assert (queue.send(A, 0).id, queue.send(B, 0).id) == ("0", "1")
    queue.requeue_after_call_end(A, died=True)
    queue.add(entry(2), [range(1)])
    assert queue.send(B, 0) is None  # the worker has one part, and the next one may have killed a server
    queue.pop("1")
    assert sent(queue, B) == ["0"]
    assert sent(queue, A) == ["2"]


def test_a_part_that_was_alone_with_two_dying_servers_is_given_up() -> None:
    queue = filled(2, workers=(A, B))
    sent(queue, A)
    assert queue.requeue_after_call_end(A, died=True) == []  # it was not alone
    assert sent(queue, A) == ["0"]
    assert queue.requeue_after_call_end(A, died=True) == []
    assert sent(queue, B) == ["0"]
    assert [part.id for part in queue.requeue_after_call_end(B, died=True)] == ["0"]
    assert sent(queue, B) == ["1"]


def test_no_batch_is_blamed_for_a_shutdown_that_the_server_announces() -> None:
    queue = filled(1)
    for _ in range(5):
        assert sent(queue, A) == ["0"]
        assert queue.requeue_after_call_end(A, died=False) == []


def test_a_part_that_has_to_wait_lets_others_pass() -> None:
    queue = filled(2)
    queue.send(A, 0)
    queue.requeue(queue.get("0"), A, not_before_s=5.0)
    assert sent(queue, A, 1.0) == ["1"]
    assert queue.may_read(A, 1.0)
    assert not queue.may_read(A, 5.0)
    assert (queue.next_retry_s(1.0), queue.next_retry_s(5.0)) == (5.0, None)
    assert sent(queue, A, 5.0) == ["0"]


def test_a_part_that_was_too_large_is_sent_as_two() -> None:
    queue = filled(0, window=10)
    batch = entry(0, 5)
    queue.add(batch, [range(5)])
    queue.send(A, 0)
    queue.requeue_halves(queue.get("0"), A)
    assert sent(queue, A) == ["0:0-2", "0:2-5"]
    failed = attribution.failed(Internal(""), index=0, id_="0")
    assert [batch.add_answer(start, failed) for start in (2, 0)] == [False, True]


def test_a_waiting_part_is_late_at_its_deadline_and_a_sent_one_a_grace_later() -> None:
    queue = filled(0, window=10)
    for index in range(2):
        queue.add(entry(index, deadline_s=10.0), [range(1)])
    queue.send(A, 0)
    assert queue.next_deadline_s() == 10.0
    late, silent = queue.pop_overdue(10.0)
    assert ([part.id for part in late], silent) == (["1"], set())
    assert queue.next_deadline_s() == 10.0 + GRACE_S
    late, silent = queue.pop_overdue(10.0 + GRACE_S)
    assert ([part.id for part in late], silent) == (["0"], {A})
    assert queue.next_deadline_s() is None


@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_worker_reads_on_until_its_window_is_full_and_always_two_batches(n_workers: int) -> None:
    workers = [f"worker {i}" for i in range(n_workers)]
    for window, most in ((1, 2), (4, 4), (5, 5)):
        queue, n = filled(0, window=window, workers=workers), 0
        for worker in workers:
            while queue.may_read(worker, 0.0):
                queue.add(entry(n), [range(1)])
                queue.send(worker, 0)
                n += 1
        assert n == most * n_workers


def test_a_window_in_all_bounds_all_workers_together() -> None:
    queue, n = ResendQueue(window=100, total_window=4), 0
    for worker in (A, B):
        queue.add_worker(worker)
    while readers := [worker for worker in (A, B) if queue.may_read(worker, 0.0)]:
        queue.add(entry(n), [range(1)])
        queue.send(readers[-1], 0)
        n += 1
    assert n == 4


def test_unread_answers_hold_the_window() -> None:
    queue = filled(0, window=1)
    entries = [entry(index) for index in range(2)]
    for each in entries:
        queue.add(each, [range(1)])
    for id_ in sent(queue, A):
        queue.pop(id_)
        queue.mark_delivered()
    assert not queue.may_read(A, 0.0)
    queue.release(entries[0])
    assert queue.may_read(A, 0.0)


def test_it_is_done_when_the_batches_are_at_their_end_and_all_is_delivered() -> None:
    queue = filled(1)
    queue.is_exhausted = True
    sent(queue, A)
    queue.pop("0")
    assert not queue.is_done
    queue.mark_delivered()
    assert queue.is_done


@given(st.data())
def test_each_part_is_always_waiting_sent_answered_or_given_up(data: st.DataObject) -> None:
    """The law behind "yielded exactly once": no part is ever in two places, and none is lost."""
    queue, workers, over = filled(0, window=4, workers=(A, B)), (A, B), []
    in_flight: dict[str, Part] = {}
    n_read, now_s = 0, 0.0
    for _ in range(data.draw(st.integers(1, 60))):
        worker = data.draw(st.sampled_from(workers))
        act = data.draw(st.sampled_from(["read", "send", "answer", "die", "end", "again", "halve"]))
        if act == "read" and queue.may_read(worker, 0.0):
            queue.add(entry(n_read, 4, deadline_s=1e9), [range(4)])
            n_read += 1
        elif act == "send" and (part := queue.send(worker, now_s)) is not None:
            assert part.id not in in_flight
            in_flight[part.id] = part
        elif act in ("die", "end"):
            before = queue.n_unanswered
            given_up = queue.requeue_after_call_end(worker, died=act == "die")
            over += given_up
            assert queue.n_unanswered == before - len(given_up)
            in_flight = {id_: part for id_, part in in_flight.items() if queue.get(id_) is part}
        elif in_flight:
            id_ = data.draw(st.sampled_from(sorted(in_flight)))
            part = in_flight.pop(id_)
            if act == "answer":
                assert queue.pop(id_) is part
                over.append(part)
            elif act == "again":
                queue.requeue(part, part.holders[0], not_before_s=now_s)
            elif act == "halve" and len(part.batch) > 1:
                queue.requeue_halves(part, part.holders[0])
            else:
                in_flight[id_] = part
    while queue.n_unanswered:
        for worker in workers:
            if (part := queue.send(worker, now_s)) is not None:
                in_flight[part.id] = part
        for id_ in list(in_flight):
            part = in_flight.pop(id_)
            assert queue.pop(id_) is part
            over.append(part)
    covered = sorted((part.entry.index, part.start + i) for part in over for i in range(len(part.batch)))
    assert covered == [(index, i) for index in range(n_read) for i in range(4)]


def test_a_part_that_is_late_is_sent_to_one_other_worker_and_answered_once() -> None:
    queue = filled(1, workers=(A, B, "worker C"), hedge_after_s=2.0)
    part = queue.send(A, 0.0)
    assert queue.next_retry_s(0.0) == 2.0
    assert queue.send(B, 1.9) is None
    assert queue.send(A, 2.0) is None
    assert queue.send(B, 2.0) is part
    assert queue.send("worker C", 99.0) is None
    assert queue.pop("0", B) is part
    assert queue.pop("0", A) is None
    assert (queue.next_cancel(A), queue.next_cancel(A), queue.next_cancel(B)) == ("0", None, None)
    assert queue.load(A).n_unanswered == queue.load(B).n_unanswered == 0


def test_an_id_is_not_sent_again_to_a_server_that_still_answers_an_earlier_batch_of_it() -> None:
    queue = filled(1, workers=(A, B), hedge_after_s=2.0)
    queue.send(A, 0.0)
    queue.send(B, 2.0)
    queue.pop("0", B)
    queue.add(entry(0), [range(1)])
    assert queue.send(A, 3.0) is None
    assert queue.get("0", A) is None
    assert queue.forget("0", A)
    assert not queue.forget("0", A)
    assert queue.send(A, 3.0) is not None


def test_a_part_that_another_worker_holds_too_is_not_sent_again_when_one_of_them_loses_it() -> None:
    queue = filled(1, workers=(A, B), hedge_after_s=2.0)
    part = queue.send(A, 0.0)
    queue.send(B, 2.0)
    assert queue.requeue_after_call_end(A, died=True) == []
    assert queue.n_unanswered == 1
    queue.requeue(part, B, not_before_s=0.0)
    assert queue.send(A, 3.0) is part
