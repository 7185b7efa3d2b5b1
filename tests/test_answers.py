"""An answer: what it keeps of its images, what it is bound to, and how it is written to disk."""

import asyncio
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sidelight
from PIL import Image

N_KEPT = 40
LARGE = (512, 512, 3)  # 786 kB, whose map of 32 × 32 takes 4 kB


def large_batches(n: int = N_KEPT) -> Iterator[np.ndarray]:
    for i in range(n):
        yield np.full((1, *LARGE), i, np.uint8)


def streamed(client: sidelight.Client, *, asynchronous: bool, keep_images: bool) -> list[sidelight.Attribution]:
    if not asynchronous:
        return list(client.stream(large_batches(), keep_images=keep_images))

    async def run() -> list[sidelight.Attribution]:
        async with sidelight.aio.connect(client.address, connect_timeout=10) as other:
            return [answer async for answer in other.stream(large_batches(), keep_images=keep_images)]

    return asyncio.run(run())


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("keep_images", [False, True])
def test_answers_that_are_kept_hold_their_batches_only_where_that_is_asked_for(
    client: sidelight.Client, keep_images: bool, asynchronous: bool
) -> None:
    streamed(client, asynchronous=asynchronous, keep_images=keep_images)  # what is made once is not counted
    tracemalloc.start()
    try:
        answers = streamed(client, asynchronous=asynchronous, keep_images=keep_images)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    batches = N_KEPT * np.prod(LARGE)
    assert len(answers) == N_KEPT
    assert held > batches if keep_images else held < batches / 5
    if keep_images:
        assert answers[3].overlay(0).size == (32, 32)
    else:
        with pytest.raises(sidelight.FailedPrecondition, match="keep_images=True"):
            answers[3].overlay(0)
        assert answers[3].maps.shape == (1, 32, 32)


def test_an_answer_of_a_stream_can_be_drawn_until_the_next_is_taken(client: sidelight.Client, tmp_path: Path) -> None:
    for ordered in (False, True):
        for answer in client.stream(large_batches(5), ordered=ordered):
            answer.save(tmp_path / f"{ordered}-{answer.index}")
            assert answer.overlay(0).size == (32, 32)


def test_the_answer_of_a_call_keeps_its_images(client: sidelight.Client) -> None:
    answer = client.attribute(next(large_batches()))
    assert answer.overlay(0).tobytes() == pickle.loads(pickle.dumps(answer)).overlay(0).tobytes()


def test_a_streamed_answer_can_be_pickled_without_its_images(client: sidelight.Client) -> None:
    (answer,) = client.stream([np.zeros(LARGE, np.uint8)])
    other = pickle.loads(pickle.dumps(answer))
    assert other.maps.tobytes() == answer.maps.tobytes()
    with pytest.raises(sidelight.FailedPrecondition, match="no longer holds its images"):
        other.picture(0)


def test_an_answer_tells_which_file_each_example_came_from(client: sidelight.Client, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 50)).save(path)
    answer = client.attribute([path, path.read_bytes(), str(path)])
    assert answer.names == (str(path), None, str(path))
    assert client.attribute(np.zeros((2, 40, 50, 3), np.uint8)).names == (None, None)
