"""Streams of batches: each is answered exactly once, reading stops at the window, and no thread remains."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from PIL import Image

from support.models import small_cnn
from support.models.gate import Gate, Gated
from support.tolerances import NEIGHBORS


@pytest.fixture
def gated(gate: Gate, device: str) -> Iterator[sidelight.Client]:
    """A client of a server whose model waits at the gate, one row at a time."""
    with (
        sidelight_server.serve(Gated(gate), device=device, max_chunk_rows=1, drain_s=0) as address,
        sidelight.connect(address, connect_timeout=10) as client,
    ):
        client.info()
        yield client
        gate.open()


def client_threads() -> set[threading.Thread]:
    """Return the running threads, without those that the server under test keeps."""
    kept = ("sidelight-prepare", "asyncio_")
    return {thread for thread in threading.enumerate() if not thread.name.startswith(kept)}


def assert_ended(threads: Iterable[threading.Thread]) -> None:
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive(), thread.name


@pytest.fixture
def no_thread_stays(client: sidelight.Client) -> Iterator[None]:
    """Fail if a thread that was started in the test does not end."""
    client.info()
    before = client_threads()
    yield
    assert_ended(client_threads() - before)


class Counted:
    """Batches that count how many were read, and notify a test that waits for a number."""

    def __init__(self, batches: Iterable[object]) -> None:
        self._batches = iter(batches)
        self._changed = threading.Condition()
        self.n_read = 0

    def __iter__(self) -> Iterator[object]:
        return self

    def __next__(self) -> object:
        batch = next(self._batches)
        with self._changed:
            self.n_read += 1
            self._changed.notify_all()
        return batch

    def wait_for(self, n: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.n_read >= n, timeout=30)


def tiny(n: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 32, 32)).astype(np.float32)


def one() -> np.ndarray:
    return tiny(1)


def assert_same(maps: np.ndarray, expected: np.ndarray) -> None:
    assert maps.shape == expected.shape
    np.testing.assert_allclose(maps, expected, rtol=0, atol=NEIGHBORS * expected.max(initial=0))


@pytest.mark.parametrize("ordered", [False, True], ids=["as-ready", "ordered"])
def test_each_batch_is_answered_once_with_its_index_and_the_maps_of_a_call(
    client: sidelight.Client, ordered: bool, no_thread_stays: None
) -> None:
    batches = [tiny(1 + i % 4, seed=i) for i in range(20)]
    answers = list(client.stream(batches, ordered=ordered, target=3, channels="l2", score="logit", keep_images=True))
    places = [answer.index for answer in answers]
    assert (places if ordered else sorted(places)) == list(range(20))
    for answer in answers:
        expected = client.attribute(batches[answer.index], target=3, channels="l2", score="logit")
        assert_same(answer.maps, expected.maps)
        assert [each.index for each in answer.targets] == [3] * len(batches[answer.index])
        assert (answer.final, answer.error, answer.failures) == (True, None, ())
        assert answer.provenance == expected.provenance
        assert answer.picture(0).tobytes() == expected.picture(0).tobytes()
        assert answer.overlay(0).size == (32, 32)


def test_a_batch_may_have_any_form_that_a_call_takes(client: sidelight.Client, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    batches = [
        path,
        str(path),
        path.read_bytes(),
        Image.fromarray(pixels),
        pixels,
        [path, pixels],
        torch.tensor(pixels),
    ]
    answers = list(client.stream(batches, ordered=True))
    expected = client.attribute(pixels).maps
    assert [len(answer) for answer in answers] == [1, 1, 1, 1, 1, 2, 1]
    for answer in answers:
        assert_same(answer.maps, np.repeat(expected, len(answer), axis=0))


def test_the_examples_of_an_array_are_streamed_one_by_one(client: sidelight.Client) -> None:
    examples = tiny(4)
    answers = list(client.stream(examples, ordered=True))
    assert_same(np.concatenate([answer.maps for answer in answers]), client.attribute(examples).maps)


@pytest.mark.parametrize("partial", [False, True])
def test_answers_of_one_row_are_final(client: sidelight.Client, partial: bool) -> None:
    assert [answer.final for answer in client.stream([one(), one()], partial=partial)] == [True, True]


def test_three_hundred_tiny_batches_of_different_sizes(client: sidelight.Client, no_thread_stays: None) -> None:
    sizes = [i % 5 for i in range(300)]
    examples = tiny(sum(sizes))
    starts = np.cumsum([0, *sizes])
    batches = [examples[start : start + size] for start, size in zip(starts, sizes, strict=False)]
    answers = list(client.stream(iter(batches)))
    assert sorted(answer.index for answer in answers) == list(range(300))
    maps = np.concatenate([answer.maps for answer in sorted(answers, key=lambda each: each.index)])
    expected = np.concatenate([client.attribute(examples[i : i + 50]).maps for i in range(0, len(examples), 50)])
    assert_same(maps, expected)


@pytest.mark.parametrize("ordered", [False, True], ids=["as-ready", "ordered"])
def test_batches_of_nothing_are_answered_too(client: sidelight.Client, ordered: bool) -> None:
    batches = [one(), [], np.empty((0, 3, 32, 32), np.float32), one(), ()]
    answers = sorted(client.stream(batches, ordered=ordered, window=1), key=lambda each: each.index)
    assert [len(answer) for answer in answers] == [1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "batches", [[], (), iter([]), (each for each in ())], ids=["list", "tuple", "iter", "generator"]
)
def test_a_stream_of_no_batches_ends_at_once(
    client: sidelight.Client, batches: Iterable[object], no_thread_stays: None
) -> None:
    assert list(client.stream(batches)) == []


def test_nothing_is_sent_or_read_before_the_first_answer_is_wanted(client: sidelight.Client) -> None:
    batches = Counted([one()])
    answers = client.stream(batches)
    assert batches.n_read == 0
    answers.close()
    assert batches.n_read == 0


@pytest.mark.parametrize(
    ("window", "size", "n_ahead"),
    [(4, 1, 4), (4, 2, 2), (6, 4, 2), (1, 1, 2), (1, 5, 2), (7, 2, 4), (None, 1, 2)],
    ids=lambda each: str(each),
)
def test_no_more_is_read_ahead_than_the_window_holds(
    gated: sidelight.Client, gate: Gate, window: int | None, size: int, n_ahead: int
) -> None:
    gate.shut()
    batches = Counted(tiny(size) for _ in range(20))
    answers = gated.stream(batches, window=window)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, answers)
        batches.wait_for(n_ahead)
        assert gate.reached.wait(30)
        for _ in range(20):  # time enough for a reader that does not stop
            gated.info()
        assert batches.n_read == n_ahead
        gate.open()
        first.result()
    for n_taken, _ in enumerate(answers, start=2):
        assert batches.n_read <= n_ahead + n_taken
    assert batches.n_read == 20


@pytest.mark.parametrize("ordered", [False, True], ids=["as-ready", "ordered"])
def test_answers_that_nobody_takes_hold_the_window(client: sidelight.Client, ordered: bool) -> None:
    batches = Counted(one() for _ in itertools.count())
    with contextlib.closing(client.stream(batches, window=4, ordered=ordered)) as answers:
        next(answers)
        batches.wait_for(5)
        for _ in range(20):
            client.info()
        assert batches.n_read == 5


def test_batches_without_end_are_read_as_answers_are_taken(client: sidelight.Client, no_thread_stays: None) -> None:
    batches = Counted(tiny(1, seed=i) for i in itertools.count())
    with contextlib.closing(client.stream(batches, ordered=True, window=3)) as answers:
        taken = list(itertools.islice(answers, 10))
    assert [answer.index for answer in taken] == list(range(10))
    assert batches.n_read <= 10 + 3
    assert_same(taken[7].maps, client.attribute(tiny(1, seed=7)).maps)


def test_a_buffer_may_be_used_again_for_the_next_batch(client: sidelight.Client) -> None:
    buffer = np.empty((32, 32, 3), np.uint8)
    pictures = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)

    def batches() -> Iterator[np.ndarray]:
        for picture in pictures:
            buffer[:] = picture
            yield buffer

    for answer in client.stream(batches(), ordered=True):
        assert_same(answer.maps, client.attribute(pictures[answer.index]).maps)
        np.testing.assert_array_equal(np.asarray(answer.picture(0)), pictures[answer.index])


class Broken(Exception):
    """An exception of the caller's own code."""


@pytest.mark.parametrize("n_before", [0, 1, 5])
def test_what_the_callers_iterator_raises_comes_out_of_the_stream(
    client: sidelight.Client, n_before: int, no_thread_stays: None
) -> None:
    def batches() -> Iterator[np.ndarray]:
        for _ in range(n_before):
            yield one()
        raise Broken("no more disk")

    with pytest.raises(Broken, match="no more disk"):
        list(client.stream(batches(), on_error="return"))
    assert len(client.attribute(one())) == 1


@pytest.mark.parametrize("batches", [5, None, object()], ids=["number", "None", "object"])
def test_what_cannot_be_iterated_is_a_type_error(client: sidelight.Client, batches: object) -> None:
    with pytest.raises(TypeError, match="not iterable"):
        list(client.stream(batches))


@pytest.mark.parametrize("batches", ["cat.png", b"\x89PNG"], ids=["str", "bytes"])
def test_one_picture_is_no_iterable_of_batches(client: sidelight.Client, batches: object) -> None:
    with pytest.raises(sidelight.InvalidArgument, match=r"batches: got (str|bytes), expected an iterable of batches"):
        list(client.stream(batches))


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
    for _ in range(5):  # the server hears of it before it answers these
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


def test_what_a_failed_batch_has_not_it_says_with_its_error(client: sidelight.Client, tmp_path: Path) -> None:
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


def test_an_unknown_label_fails_each_batch_by_naming_the_near_one(client: sidelight.Client) -> None:
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


def test_a_batch_whose_time_is_over_ends_a_stream_that_raises(gated: sidelight.Client, gate: Gate) -> None:
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


def test_two_streams_of_one_client_go_side_by_side(client: sidelight.Client, no_thread_stays: None) -> None:
    ones, twos = ([tiny(1 + i % 3, seed=seed + i) for i in range(30)] for seed in (100, 200))
    pairs = list(zip(client.stream(ones, ordered=True), client.stream(twos, ordered=True), strict=True))
    assert len(pairs) == 30
    for i in (0, 13, 29):
        assert_same(pairs[i][0].maps, client.attribute(ones[i]).maps)
        assert_same(pairs[i][1].maps, client.attribute(twos[i]).maps)


def test_streams_in_threads_of_one_client_do_not_mix(client: sidelight.Client, no_thread_stays: None) -> None:
    def run(seed: int) -> None:
        batches = [tiny(1 + i % 3, seed=seed + i) for i in range(30)]
        answers = list(client.stream(batches))
        assert sorted(answer.index for answer in answers) == list(range(30))
        for answer in answers[::10]:
            assert_same(answer.maps, client.attribute(batches[answer.index]).maps)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, (100, 200, 300, 400)))


def test_a_call_inside_the_loop_of_a_stream_is_answered(client: sidelight.Client) -> None:
    for answer in client.stream([tiny(2, seed=i) for i in range(5)]):
        assert_same(answer.maps, client.attribute(tiny(2, seed=answer.index)).maps)


def test_a_stream_inside_the_batches_of_a_stream_is_answered(client: sidelight.Client) -> None:
    """A pipeline: the maps of one stream become the batches of another."""

    def weighted() -> Iterator[np.ndarray]:
        for answer in client.stream([tiny(2, seed=i) for i in range(5)], ordered=True):
            yield tiny(2, seed=answer.index) * (answer.maps / answer.maps.max())[:, None]

    assert [answer.index for answer in client.stream(weighted(), ordered=True)] == list(range(5))


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
