"""Streams of batches: each is answered exactly once, reading stops at the window, and no thread remains."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sidelight
import torch
from PIL import Image

from support.messages.batches import Broken, Counted, one, tiny
from support.models.gate import Gate
from support.tolerances import assert_same


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
def test_empty_batches_are_answered(client: sidelight.Client, ordered: bool) -> None:
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
def test_unread_answers_hold_the_window(client: sidelight.Client, ordered: bool) -> None:
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


@pytest.mark.parametrize("n_before", [0, 1, 5])
def test_an_exception_in_the_callers_iterator_is_raised_by_the_stream(
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
