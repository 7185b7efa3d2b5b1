"""Streams that are closed, fail, or lose their server."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
from PIL import Image

from support.messages.batches import Broken, Counted, assert_ended, client_threads, one, tiny
from support.models import small_cnn
from support.models.gate import Gate
from support.tolerances import assert_same


def test_closing_early_cancels_what_is_unanswered(gated: sidelight.Client, gate: Gate) -> None:
    gate.shut()
    before = client_threads()
    batches = Counted(one() for _ in range(50))
    answers = gated.stream(batches, window=8)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, answers)
        batches.wait_for(8)
        assert gate.reached.wait(30)
        gate.open()
        first.result()
        gate.shut()
        answers.close()
    for _ in range(5):  # the server handles the cancel before it answers these
        gated.info()
    gate.open()
    assert len(gated.attribute(one())) == 1
    assert batches.n_read < 50
    assert gate.n_rows < 8
    assert_ended(client_threads() - before)
    assert list(answers) == []


def test_leaving_the_loop_early_ends_the_threads(client: sidelight.Client, no_thread_stays: None) -> None:
    for answer in client.stream(one() for _ in itertools.count()):
        assert len(answer) == 1
        break


def test_an_error_in_the_loop_ends_the_threads(client: sidelight.Client, no_thread_stays: None) -> None:
    def loop() -> None:
        with contextlib.closing(client.stream(one() for _ in itertools.count())) as answers:
            for _ in answers:
                raise Broken

    with pytest.raises(Broken):
        loop()


def test_a_process_that_leaves_a_stream_open_ends(address: str) -> None:
    code = """
import itertools, sys, numpy, sidelight
client = sidelight.connect(sys.argv[1])
answers = client.stream(numpy.zeros((1, 3, 32, 32), "f4") for _ in itertools.count())
print(len(next(answers)))
"""
    done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"
    assert done.stderr == ""


BAD: dict[str, tuple[object, type[sidelight.SidelightError], str]] = {
    "None": (None, sidelight.InvalidArgument, "images: got NoneType"),
    "wrong-dtype": (np.zeros((3, 32, 32), int), sidelight.InvalidArgument, "images: got int64"),
    "missing-file": ("missing.png", sidelight.exceptions.UnreadableFile, "missing.png"),
    "missing-file-in-a-list": ([b"", "missing.png"], sidelight.exceptions.UnreadableFile, "missing.png"),
    "folder": (os.curdir, sidelight.exceptions.UnreadableFile, "images: "),
    "wrong-size": (np.zeros((3, 31, 32), np.float32), sidelight.InvalidArgument, "[C, H, W] = [3, 32, 32]"),
    "dimension-of-zero": (np.zeros((1, 3, 0, 32), np.float32), sidelight.InvalidArgument, "has a dimension of 0"),
}
each_bad = pytest.mark.parametrize(("bad", "kind", "message"), BAD.values(), ids=BAD.keys())


@each_bad
@pytest.mark.parametrize("ordered", [False, True], ids=["as-ready", "ordered"])
def test_a_bad_batch_is_answered_with_its_error_and_the_others_with_their_maps(
    client: sidelight.Client,
    bad: object,
    kind: type[sidelight.SidelightError],
    message: str,
    ordered: bool,
    no_thread_stays: None,
) -> None:
    good = one()
    answers = list(client.stream([good, bad, good, bad, good], ordered=ordered, on_error="return", window=2))
    assert ([answer.index for answer in answers] if ordered else sorted(a.index for a in answers)) == list(range(5))
    expected = client.attribute(good).maps
    for answer in answers:
        if answer.index % 2 == 0:
            assert answer.error is None
            assert_same(answer.maps, expected)
        else:
            assert isinstance(answer.error, kind)
            assert message in answer.error.message
            assert len(answer) == 0


@each_bad
def test_a_bad_batch_raises_its_error_and_ends_the_stream(
    client: sidelight.Client, bad: object, kind: type[sidelight.SidelightError], message: str, no_thread_stays: None
) -> None:
    answers = client.stream([one(), bad, one()], ordered=True)
    assert next(answers).index == 0
    with pytest.raises(kind) as caught:
        next(answers)
    assert message in caught.value.message
    assert list(answers) == []


def test_an_example_too_large_to_be_sent_leaves_the_stream_as_it_is(address: str) -> None:
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=50_000) as client:
        large = np.zeros((6, 200, 200, 3), np.uint8)
        answers = list(client.stream([one(), large, one()], ordered=True, on_error="return"))
    assert [type(answer.error) for answer in answers] == [type(None), sidelight.exceptions.MessageTooLarge, type(None)]
    assert [len(answer) for answer in answers] == [1, 0, 1]


def test_an_answer_too_large_to_be_taken_leaves_the_stream_as_it_is(address: str, tmp_path: Path) -> None:
    path = tmp_path / "white.png"
    Image.new("RGB", (32, 32), "white").save(path)
    with sidelight.connect(address, connect_timeout=10, max_message_bytes=10_000) as client:
        target = sidelight.TopK(3)  # each example's three maps take 12,288 bytes
        (answer,) = client.stream([path], target=target, on_error="return")
    assert type(answer.error) is sidelight.exceptions.MessageTooLarge


def test_pictures_of_a_failed_batch_raise_its_error(client: sidelight.Client, tmp_path: Path) -> None:
    (answer,) = client.stream([None], on_error="return")
    for ask in (lambda: answer.picture(0), lambda: answer.overlay(0), lambda: answer.save(tmp_path / "out")):
        with pytest.raises(sidelight.InvalidArgument, match="got NoneType"):
            ask()
    assert not (tmp_path / "out").exists()


def test_a_stream_of_nothing_but_bad_batches_answers_each(client: sidelight.Client, no_thread_stays: None) -> None:
    answers = list(client.stream([None] * 50, on_error="return", ordered=True, window=1))
    assert [answer.index for answer in answers] == list(range(50))
    assert all(answer.error for answer in answers)


def test_a_bad_example_fails_alone(client: sidelight.Client) -> None:
    broken = tiny(3)
    broken[1] = np.nan
    first, second = client.stream([broken, tiny(2)], ordered=True, on_error="return")
    assert [each.example for each in first.failures] == [1]
    assert first.error is None
    assert_same(first.maps[::2], client.attribute(tiny(3)).maps[::2])
    assert len(second) == 2
    with pytest.raises(sidelight.PartialFailure, match="1 of 3 examples failed; example 1") as caught:
        list(client.stream([broken]))
    assert caught.value.answer.index == 0
    assert_same(caught.value.answer.maps[::2], first.maps[::2])


def test_an_unknown_label_fails_each_batch_and_a_similar_label_is_suggested(client: sidelight.Client) -> None:
    answers = list(client.stream([one(), one()], target="elc", on_error="return"))
    assert [type(answer.error) for answer in answers] == [sidelight.NotFound] * 2
    assert all('did you mean "elk"?' in answer.error.message for answer in answers)


def test_each_batch_has_a_time_of_its_own(gated: sidelight.Client, gate: Gate) -> None:
    over = threading.Event()

    def batches() -> Iterator[np.ndarray]:
        gate.shut()
        yield one()
        assert over.wait(30)
        gate.open()
        yield one()
        yield one()

    answers = gated.stream(batches(), timeout=0.5, on_error="return", ordered=True)
    late = next(answers)
    assert isinstance(late.error, sidelight.DeadlineExceeded)
    assert late.index == 0
    over.set()
    assert [(answer.index, answer.error) for answer in answers] == [(1, None), (2, None)]


def test_a_batch_past_its_timeout_ends_a_stream_that_raises(gated: sidelight.Client, gate: Gate) -> None:
    gate.shut()
    with pytest.raises(sidelight.DeadlineExceeded):
        list(gated.stream([one()], timeout=0.2))


@pytest.mark.parametrize(("ordered", "expected"), [(False, [1, 2, 0]), (True, [0, 1, 2])], ids=["as-ready", "ordered"])
def test_a_short_batch_overtakes_a_long_one_unless_order_is_wanted(
    gated: sidelight.Client, gate: Gate, ordered: bool, expected: list[int]
) -> None:
    gate.shut()
    batches = Counted([tiny(9), one(), one()])
    answers = gated.stream(batches, window=20, ordered=ordered)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(lambda: [answer.index for answer in answers])
        batches.wait_for(3)
        assert gate.reached.wait(30)
        for _ in range(20):  # until all three are with the server
            gated.info()
        gate.open()
        assert taken.result() == expected


@pytest.mark.parametrize("ordered", [False, True], ids=["as-ready", "ordered"])
def test_a_server_that_goes_away_makes_the_stream_unavailable(
    device: str, ordered: bool, no_thread_stays: None
) -> None:
    gone = threading.Event()

    def batches() -> Iterator[np.ndarray]:
        yield one()
        yield one()
        gone.wait(30)

    with contextlib.ExitStack() as server:
        address = server.enter_context(sidelight_server.serve(small_cnn(), device=device, drain_s=0))
        with sidelight.connect(address, connect_timeout=2) as client:
            answers = client.stream(batches(), on_error="return", ordered=ordered)
            assert [next(answers).error, next(answers).error] == [None, None]
            server.close()
            with pytest.raises(sidelight.Unavailable):
                next(answers)
            assert list(answers) == []
            gone.set()


def test_closing_the_client_ends_its_streams(address: str, no_thread_stays: None) -> None:
    closed = threading.Event()

    def batches() -> Iterator[np.ndarray]:
        yield one()
        closed.wait(30)

    client = sidelight.connect(address, connect_timeout=10)
    answers = client.stream(batches())
    next(answers)
    client.close()
    with pytest.raises(sidelight.exceptions.Cancelled):
        next(answers)
    closed.set()


@pytest.mark.parametrize(
    "slow", [lambda gate: gate.shut(), lambda gate: None], ids=["while-the-server-works", "while-it-is-idle"]
)
def test_a_stream_can_be_closed_while_its_batches_are_awaited(
    gated: sidelight.Client, gate: Gate, slow: Callable[[Gate], None]
) -> None:
    """The caller's iterator blocks, for example on a socket: closing does not wait for it."""
    answered, hangs, go_on = threading.Event(), threading.Event(), threading.Event()

    def batches() -> Iterator[np.ndarray]:
        yield one()
        assert answered.wait(30)
        slow(gate)
        yield one()
        hangs.set()
        go_on.wait(30)

    answers = gated.stream(batches(), window=5)
    next(answers)
    answered.set()
    assert hangs.wait(30)
    answers.close()
    assert not go_on.is_set()
    go_on.set()
