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
    unanswered = ResendQueue(window=window, hedge_after_s=hedge_after_s)
    for worker in workers:
        unanswered.add_worker(worker)
    for index in range(n_batches):
        unanswered.add(entry(index), [range(1)])
    return unanswered


def sent(unanswered: ResendQueue, worker: str, now_s: float = 0.0) -> list[str]:
    """Send a worker all parts that it may have."""
    ids = []
    while (part := unanswered.send(worker, now_s)) is not None:
        ids.append(part.id)
    return ids


def test_parts_are_sent_in_the_order_of_their_batches() -> None:
    assert sent(filled(3), A) == ["0", "1", "2"]


def test_a_batch_in_parts_is_sent_as_spans_that_cover_it() -> None:
    unanswered = filled(0, window=10)
    unanswered.add(entry(4, 5), [range(2), range(2, 4), range(4, 5)])
    assert sent(unanswered, A) == ["4:0-2", "4:2-4", "4:4-5"]
    assert [len(unanswered.get(id_).batch) for id_ in ("4:0-2", "4:2-4", "4:4-5")] == [2, 2, 1]


def test_an_answer_comes_once() -> None:
    unanswered = filled(1)
    sent(unanswered, A)
    assert unanswered.pop("0").id == "0"
    assert unanswered.pop("0") is None
    assert unanswered.get("0") is None


def test_what_a_worker_had_sent_when_its_call_ended_in_order_is_sent_again_before_what_came_later() -> None:
    unanswered = filled(3)
    sent(unanswered, A)
    assert unanswered.requeue_after_call_end(A, died=False) == []
    unanswered.add(entry(3), [range(1)])
    assert sent(unanswered, A) == ["0", "1", "2", "3"]


def test_what_a_server_held_when_it_died_is_sent_alone() -> None:
    unanswered = filled(3)
    sent(unanswered, A)
    unanswered.requeue_after_call_end(A, died=True)
    for id_ in ("0", "1", "2"):
        assert sent(unanswered, A) == [id_]
        assert not unanswered.may_read(A, 0.0)
        unanswered.pop(id_)
    assert unanswered.may_read(A, 0.0)


def test_a_worker_runs_empty_before_it_is_sent_a_suspect_and_another_goes_on() -> None:
    unanswered = filled(2, workers=(A, B))
    assert (unanswered.send(A, 0).id, unanswered.send(B, 0).id) == ("0", "1")
    unanswered.requeue_after_call_end(A, died=True)
    unanswered.add(entry(2), [range(1)])
    assert unanswered.send(B, 0) is None  # it has one, and the next is a suspect
    unanswered.pop("1")
    assert sent(unanswered, B) == ["0"]
    assert sent(unanswered, A) == ["2"]


def test_a_part_that_was_alone_with_two_dying_servers_is_given_up() -> None:
    unanswered = filled(2, workers=(A, B))
    sent(unanswered, A)
    assert unanswered.requeue_after_call_end(A, died=True) == []  # in company
    assert sent(unanswered, A) == ["0"]
    assert unanswered.requeue_after_call_end(A, died=True) == []
    assert sent(unanswered, B) == ["0"]
    assert [part.id for part in unanswered.requeue_after_call_end(B, died=True)] == ["0"]
    assert sent(unanswered, B) == ["1"]


def test_the_end_of_a_server_that_says_so_accuses_nobody() -> None:
    unanswered = filled(1)
    for _ in range(5):
        assert sent(unanswered, A) == ["0"]
        assert unanswered.requeue_after_call_end(A, died=False) == []


def test_a_part_that_has_to_wait_lets_others_pass() -> None:
    unanswered = filled(2)
    unanswered.send(A, 0)
    unanswered.requeue(unanswered.get("0"), A, not_before_s=5.0)
    assert sent(unanswered, A, 1.0) == ["1"]
    assert unanswered.may_read(A, 1.0)
    assert not unanswered.may_read(A, 5.0)
    assert (unanswered.next_retry_s(1.0), unanswered.next_retry_s(5.0)) == (5.0, None)
    assert sent(unanswered, A, 5.0) == ["0"]


def test_a_part_that_was_too_large_is_sent_as_two() -> None:
    unanswered = filled(0, window=10)
    batch = entry(0, 5)
    unanswered.add(batch, [range(5)])
    unanswered.send(A, 0)
    unanswered.requeue_halves(unanswered.get("0"), A)
    assert sent(unanswered, A) == ["0:0-2", "0:2-5"]
    failed = attribution.failed(Internal(""), index=0, id_="0")
    assert [batch.add_answer(start, failed) for start in (2, 0)] == [False, True]


def test_a_waiting_part_is_late_at_its_deadline_and_a_sent_one_a_grace_later() -> None:
    unanswered = filled(0, window=10)
    for index in range(2):
        unanswered.add(entry(index, deadline_s=10.0), [range(1)])
    unanswered.send(A, 0)
    assert unanswered.next_deadline_s() == 10.0
    late, silent = unanswered.pop_overdue(10.0)
    assert ([part.id for part in late], silent) == (["1"], set())
    assert unanswered.next_deadline_s() == 10.0 + GRACE_S
    late, silent = unanswered.pop_overdue(10.0 + GRACE_S)
    assert ([part.id for part in late], silent) == (["0"], {A})
    assert unanswered.next_deadline_s() is None


@pytest.mark.parametrize("n_workers", [1, 3])
def test_a_worker_reads_on_until_its_window_is_full_and_always_two_batches(n_workers: int) -> None:
    workers = [f"worker {i}" for i in range(n_workers)]
    for window, most in ((1, 2), (4, 4), (5, 5)):
        unanswered, n = filled(0, window=window, workers=workers), 0
        for worker in workers:
            while unanswered.may_read(worker, 0.0):
                unanswered.add(entry(n), [range(1)])
                unanswered.send(worker, 0)
                n += 1
        assert n == most * n_workers


def test_a_window_in_all_bounds_all_workers_together() -> None:
    unanswered, n = ResendQueue(window=100, total_window=4), 0
    for worker in (A, B):
        unanswered.add_worker(worker)
    while readers := [worker for worker in (A, B) if unanswered.may_read(worker, 0.0)]:
        unanswered.add(entry(n), [range(1)])
        unanswered.send(readers[-1], 0)
        n += 1
    assert n == 4


def test_answers_that_nobody_takes_hold_the_window() -> None:
    unanswered = filled(0, window=1)
    entries = [entry(index) for index in range(2)]
    for each in entries:
        unanswered.add(each, [range(1)])
    for id_ in sent(unanswered, A):
        unanswered.pop(id_)
        unanswered.mark_delivered()
    assert not unanswered.may_read(A, 0.0)
    unanswered.release(entries[0])
    assert unanswered.may_read(A, 0.0)


def test_it_is_done_when_the_batches_are_at_their_end_and_all_is_delivered() -> None:
    unanswered = filled(1)
    unanswered.is_exhausted = True
    sent(unanswered, A)
    unanswered.pop("0")
    assert not unanswered.is_done
    unanswered.mark_delivered()
    assert unanswered.is_done


@given(st.data())
def test_whatever_happens_each_part_is_waiting_sent_answered_or_given_up(data: st.DataObject) -> None:
    """The law behind "yielded exactly once": no part is ever in two places, and none is lost."""
    unanswered, workers, over = filled(0, window=4, workers=(A, B)), (A, B), []
    in_flight: dict[str, Part] = {}
    n_read, now_s = 0, 0.0
    for _ in range(data.draw(st.integers(1, 60))):
        worker = data.draw(st.sampled_from(workers))
        act = data.draw(st.sampled_from(["read", "send", "answer", "die", "end", "again", "halve"]))
        if act == "read" and unanswered.may_read(worker, 0.0):
            unanswered.add(entry(n_read, 4, deadline_s=1e9), [range(4)])
            n_read += 1
        elif act == "send" and (part := unanswered.send(worker, now_s)) is not None:
            assert part.id not in in_flight
            in_flight[part.id] = part
        elif act in ("die", "end"):
            before = unanswered.n_unanswered
            given_up = unanswered.requeue_after_call_end(worker, died=act == "die")
            over += given_up
            assert unanswered.n_unanswered == before - len(given_up)
            in_flight = {id_: part for id_, part in in_flight.items() if unanswered.get(id_) is part}
        elif in_flight:
            id_ = data.draw(st.sampled_from(sorted(in_flight)))
            part = in_flight.pop(id_)
            if act == "answer":
                assert unanswered.pop(id_) is part
                over.append(part)
            elif act == "again":
                unanswered.requeue(part, part.holders[0], not_before_s=now_s)
            elif act == "halve" and len(part.batch) > 1:
                unanswered.requeue_halves(part, part.holders[0])
            else:
                in_flight[id_] = part
    while unanswered.n_unanswered:
        for worker in workers:
            if (part := unanswered.send(worker, now_s)) is not None:
                in_flight[part.id] = part
        for id_ in list(in_flight):
            part = in_flight.pop(id_)
            assert unanswered.pop(id_) is part
            over.append(part)
    covered = sorted((part.entry.index, part.start + i) for part in over for i in range(len(part.batch)))
    assert covered == [(index, i) for index in range(n_read) for i in range(4)]


def test_a_part_that_is_late_is_sent_to_one_other_worker_and_answered_once() -> None:
    unanswered = filled(1, workers=(A, B, "worker C"), hedge_after_s=2.0)
    part = unanswered.send(A, 0.0)
    assert unanswered.next_retry_s(0.0) == 2.0
    assert unanswered.send(B, 1.9) is None
    assert unanswered.send(A, 2.0) is None
    assert unanswered.send(B, 2.0) is part
    assert unanswered.send("worker C", 99.0) is None
    assert unanswered.pop("0", B) is part
    assert unanswered.pop("0", A) is None
    assert (unanswered.next_cancel(A), unanswered.next_cancel(A), unanswered.next_cancel(B)) == ("0", None, None)
    assert unanswered.load(A).n_unanswered == unanswered.load(B).n_unanswered == 0


def test_an_id_is_not_sent_again_to_a_server_that_still_answers_an_earlier_batch_of_it() -> None:
    unanswered = filled(1, workers=(A, B), hedge_after_s=2.0)
    unanswered.send(A, 0.0)
    unanswered.send(B, 2.0)
    unanswered.pop("0", B)
    unanswered.add(entry(0), [range(1)])
    assert unanswered.send(A, 3.0) is None
    assert unanswered.get("0", A) is None
    assert unanswered.forget("0", A)
    assert not unanswered.forget("0", A)
    assert unanswered.send(A, 3.0) is not None


def test_a_part_that_another_worker_holds_too_is_not_sent_again_when_one_of_them_loses_it() -> None:
    unanswered = filled(1, workers=(A, B), hedge_after_s=2.0)
    part = unanswered.send(A, 0.0)
    unanswered.send(B, 2.0)
    assert unanswered.requeue_after_call_end(A, died=True) == []
    assert unanswered.n_unanswered == 1
    unanswered.requeue(part, B, not_before_s=0.0)
    assert unanswered.send(A, 3.0) is part
