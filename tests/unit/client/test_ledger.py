"""The ledger: what is sent, sent again, sent alone, and given up. It has neither clock nor thread; nor have these."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidelight._inputs.images import EncodedBatch
from sidelight._streaming.in_flight import GRACE_S, Entry, InFlightBatches, Part
from sidelight.exceptions import Internal
from sidelight.results import attribution

A, B = "lane A", "lane B"


def entry(index: int, n: int = 1, *, deadline_s: float = 100.0) -> Entry:
    return Entry(index, EncodedBatch(np.zeros((n, 1, 1, 1), np.float32)), deadline_s)


def filled(n_batches: int, *, window: int = 100, n_lanes: int = 1, in_all: int | None = None) -> InFlightBatches:
    in_flight = InFlightBatches(window=window, n_lanes=n_lanes, in_all=in_all)
    for index in range(n_batches):
        in_flight.add(entry(index), [range(1)])
    return in_flight


def sent(in_flight: InFlightBatches, worker: str, now_s: float = 0.0) -> list[str]:
    """Send a lane all that it may have."""
    ids = []
    while (part := in_flight.send(worker, now_s)) is not None:
        ids.append(part.id)
    return ids


def test_parts_are_sent_in_the_order_of_their_batches() -> None:
    assert sent(filled(3), A) == ["0", "1", "2"]


def test_a_batch_in_parts_is_sent_as_spans_that_cover_it() -> None:
    in_flight = InFlightBatches(window=10)
    in_flight.add(entry(4, 5), [range(2), range(2, 4), range(4, 5)])
    assert sent(in_flight, A) == ["4:0-2", "4:2-4", "4:4-5"]
    assert [len(in_flight.get(id_).batch) for id_ in ("4:0-2", "4:2-4", "4:4-5")] == [2, 2, 1]


def test_an_answer_comes_once() -> None:
    in_flight = filled(1)
    sent(in_flight, A)
    assert in_flight.answered("0").id == "0"
    assert in_flight.answered("0") is None
    assert in_flight.get("0") is None


def test_what_a_lane_held_when_it_ended_in_order_is_sent_again_before_what_came_later() -> None:
    in_flight = filled(3)
    sent(in_flight, A)
    assert in_flight.lost(A, died=False) == []
    in_flight.add(entry(3), [range(1)])
    assert sent(in_flight, A) == ["0", "1", "2", "3"]


def test_what_a_server_held_when_it_died_is_sent_alone() -> None:
    in_flight = filled(3)
    sent(in_flight, A)
    in_flight.lost(A, died=True)
    for id_ in ("0", "1", "2"):
        assert sent(in_flight, A) == [id_]
        assert not in_flight.may_read(A, 0.0)
        in_flight.answered(id_)
    assert in_flight.may_read(A, 0.0)


def test_a_lane_runs_empty_before_it_is_sent_a_suspect_and_another_goes_on() -> None:
    in_flight = filled(2, n_lanes=2)
    assert (in_flight.send(A, 0).id, in_flight.send(B, 0).id) == ("0", "1")
    in_flight.lost(A, died=True)
    in_flight.add(entry(2), [range(1)])
    assert in_flight.send(B, 0) is None  # it has one, and the next is a suspect
    in_flight.answered("1")
    assert sent(in_flight, B) == ["0"]
    assert sent(in_flight, A) == ["2"]


def test_a_part_that_was_alone_with_two_dying_servers_is_given_up() -> None:
    in_flight = filled(2)
    sent(in_flight, A)
    assert in_flight.lost(A, died=True) == []  # in company
    assert sent(in_flight, A) == ["0"]
    assert in_flight.lost(A, died=True) == []
    assert sent(in_flight, B) == ["0"]
    assert [part.id for part in in_flight.lost(B, died=True)] == ["0"]
    assert sent(in_flight, B) == ["1"]


def test_the_end_of_a_server_that_says_so_accuses_nobody() -> None:
    in_flight = filled(1)
    for _ in range(5):
        assert sent(in_flight, A) == ["0"]
        assert in_flight.lost(A, died=False) == []


def test_a_part_that_has_to_wait_lets_others_pass() -> None:
    in_flight = filled(2)
    in_flight.send(A, 0)
    in_flight.again(in_flight.get("0"), not_before_s=5.0)
    assert sent(in_flight, A, 1.0) == ["1"]
    assert in_flight.may_read(A, 1.0)
    assert not in_flight.may_read(A, 5.0)
    assert (in_flight.next_sending_s(1.0), in_flight.next_sending_s(5.0)) == (5.0, None)
    assert sent(in_flight, A, 5.0) == ["0"]


def test_a_part_that_was_too_large_is_sent_as_two() -> None:
    in_flight = InFlightBatches(window=10)
    batch = entry(0, 5)
    in_flight.add(batch, [range(5)])
    in_flight.send(A, 0)
    in_flight.halve(in_flight.get("0"))
    assert sent(in_flight, A) == ["0:0-2", "0:2-5"]
    failed = attribution.failed(Internal(""), index=0, id_="0")
    assert [batch.settle(start, failed) for start in (2, 0)] == [False, True]


def test_what_waits_is_late_at_its_deadline_and_what_flies_a_grace_later() -> None:
    in_flight = InFlightBatches(window=10)
    for index in range(2):
        in_flight.add(entry(index, deadline_s=10.0), [range(1)])
    in_flight.send(A, 0)
    assert in_flight.next_deadline_s() == 10.0
    late, silent = in_flight.overdue(10.0)
    assert ([part.id for part in late], silent) == (["1"], set())
    assert in_flight.next_deadline_s() == 10.0 + GRACE_S
    late, silent = in_flight.overdue(10.0 + GRACE_S)
    assert ([part.id for part in late], silent) == (["0"], {A})
    assert in_flight.next_deadline_s() is None


@pytest.mark.parametrize("n_lanes", [1, 3])
def test_a_lane_reads_on_until_its_window_is_full_and_always_two_batches(n_lanes: int) -> None:
    workers = [f"lane {i}" for i in range(n_lanes)]
    for window, most in ((1, 2), (4, 4), (5, 5)):
        in_flight, n = InFlightBatches(window=window, n_lanes=n_lanes), 0
        for worker in workers:
            while in_flight.may_read(worker, 0.0):
                in_flight.add(entry(n), [range(1)])
                in_flight.send(worker, 0)
                n += 1
        assert n == most * n_lanes


def test_a_window_in_all_bounds_all_lanes_together() -> None:
    in_flight, n = InFlightBatches(window=4, in_all=4, n_lanes=2), 0
    while readers := [worker for worker in (A, B) if in_flight.may_read(worker, 0.0)]:
        in_flight.add(entry(n), [range(1)])
        in_flight.send(readers[-1], 0)
        n += 1
    assert n == 4


def test_answers_that_nobody_takes_hold_the_window() -> None:
    in_flight = InFlightBatches(window=1)
    entries = [entry(index) for index in range(2)]
    for each in entries:
        in_flight.add(each, [range(1)])
    for id_ in sent(in_flight, A):
        in_flight.answered(id_)
        in_flight.delivered()
    assert not in_flight.may_read(A, 0.0)
    in_flight.taken(entries[0])
    assert in_flight.may_read(A, 0.0)


def test_it_is_done_when_the_batches_are_at_their_end_and_all_is_delivered() -> None:
    in_flight = filled(1)
    in_flight.is_exhausted = True
    sent(in_flight, A)
    in_flight.answered("0")
    assert not in_flight.is_done
    in_flight.delivered()
    assert in_flight.is_done


@given(st.data())
def test_whatever_happens_each_part_is_waiting_flying_answered_or_given_up(data: st.DataObject) -> None:
    """The law behind "yielded exactly once": no part is ever in two places, and none is lost."""
    in_flight, workers, over = InFlightBatches(window=4, n_lanes=2), (A, B), []
    flying: dict[str, Part] = {}
    n_read, now_s = 0, 0.0
    for _ in range(data.draw(st.integers(1, 60))):
        worker = data.draw(st.sampled_from(workers))
        act = data.draw(st.sampled_from(["read", "send", "answer", "die", "end", "again", "halve"]))
        if act == "read" and in_flight.may_read(worker, 0.0):
            in_flight.add(entry(n_read, 4, deadline_s=1e9), [range(4)])
            n_read += 1
        elif act == "send" and (part := in_flight.send(worker, now_s)) is not None:
            assert part.id not in flying
            flying[part.id] = part
        elif act in ("die", "end"):
            before = in_flight.n_unanswered
            given_up = in_flight.lost(worker, died=act == "die")
            over += given_up
            assert in_flight.n_unanswered == before - len(given_up)
            flying = {id_: part for id_, part in flying.items() if in_flight.get(id_) is part}
        elif flying:
            id_ = data.draw(st.sampled_from(sorted(flying)))
            part = flying.pop(id_)
            if act == "answer":
                assert in_flight.answered(id_) is part
                over.append(part)
            elif act == "again":
                in_flight.again(part, not_before_s=now_s)
            elif act == "halve" and len(part.batch) > 1:
                in_flight.halve(part)
            else:
                flying[id_] = part
    while in_flight.n_unanswered:
        for worker in workers:
            if (part := in_flight.send(worker, now_s)) is not None:
                flying[part.id] = part
        for id_ in list(flying):
            part = flying.pop(id_)
            assert in_flight.answered(id_) is part
            over.append(part)
    covered = sorted((part.entry.index, part.start + i) for part in over for i in range(len(part.batch)))
    assert covered == [(index, i) for index in range(n_read) for i in range(4)]
