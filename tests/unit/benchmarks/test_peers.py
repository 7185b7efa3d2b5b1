"""The comparison with peers: its arithmetic and the closed loop, without the peers."""

import contextlib
import threading

import numpy as np
import pytest

from benchmarks.peers.driver import Answer, closed_loop
from benchmarks.peers.http_body import body_of, pixels_of, read_bytes
from benchmarks.peers.record import Record, Round, percentile


def test_a_percentile_is_one_of_the_values():
    values = [float(n) for n in range(1, 201)]
    assert percentile(values, 0.99) == 198
    assert percentile(values[:50], 0.99) == 50
    assert percentile([3.0], 0.99) == 3


def record(**rounds):
    return Record({int(n.removeprefix("n")): [Round(*each) for each in all_] for n, all_ in rounds.items()})


def test_the_best_setting_has_the_lowest_p99_among_the_fast_ones():
    assert record(n4=[(19.0, 0.2)], n8=[(19.8, 0.4)], n16=[(20.0, 0.8)]).best() == 8


def test_ours_is_the_fastest_setting_whose_p99_is_no_worse():
    ours = record(n4=[(19.0, 0.2)], n8=[(19.8, 0.4)], n16=[(20.0, 0.8)])
    assert ours.fastest_within(0.4) == 8
    assert ours.fastest_within(0.1) is None


def test_a_ratio_is_the_median_of_the_rounds_own():
    ours = record(n8=[(20.0, 0.4), (10.0, 0.8), (22.0, 0.4)])
    theirs = record(n4=[(10.0, 0.4), (5.0, 0.8), (10.0, 0.4)])
    assert ours.times(8, theirs, 4) == 2.0


def test_one_round_with_a_hiccup_does_not_move_the_p99():
    assert record(n8=[(20.0, 0.4), (20.0, 5.0), (20.0, 0.5)]).p99_s(8) == 0.5


def test_the_body_of_an_answer_contains_the_map():
    map_ = np.random.default_rng(0).random((224, 224), np.float32)
    answer = read_bytes(body_of(map_, 123, 0.5))
    assert answer.predicted == 123
    assert np.array_equal(answer.map, map_)


def test_pixels_of_another_size_are_refused():
    with pytest.raises(ValueError, match="reshape"):
        pixels_of(b"123")


def test_a_closed_loop_requests_every_image_once_and_within_its_concurrency():
    images = [np.full((1, 1, 3), n, np.uint8) for n in range(20)]
    together = threading.Barrier(4)  # broken if fewer than four requests ever run at once
    lock, asking, most = threading.Lock(), 0, 0

    def ask(image):
        nonlocal asking, most
        with lock:
            asking += 1
            most = max(most, asking)
        together.wait(timeout=10)
        with lock:
            asking -= 1
        return Answer(image[..., 0], int(image[0, 0, 0]))

    @contextlib.contextmanager
    def connect():
        yield ask

    loop = closed_loop(connect)(images, 4)
    assert [answer.predicted for answer in loop.answers] == list(range(20))
    assert most == 4
    assert len(loop.latencies_s) == 20
    assert 0 < max(loop.latencies_s) <= loop.wall_s
