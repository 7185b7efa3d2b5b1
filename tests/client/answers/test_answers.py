"""Answers: which images they keep, their index and id, and how they are saved."""

import asyncio
import errno
import json
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sidelight
from PIL import Image
from sidelight._inputs.images import EncodedBatch

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
    with pytest.raises(sidelight.FailedPrecondition, match="no longer has its images"):
        other.picture(0)


def test_an_answer_reports_which_file_each_example_came_from(client: sidelight.Client, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 50)).save(path)
    answer = client.attribute([path, path.read_bytes(), str(path)])
    assert answer.names == (str(path), None, str(path))
    assert client.attribute(np.zeros((2, 40, 50, 3), np.uint8)).names == (None, None)


def test_an_answer_does_not_overwrite_another_unless_asked_to(client: sidelight.Client, tmp_path: Path) -> None:
    folder = tmp_path / "why"
    first = client.attribute(np.zeros((3, *LARGE), np.uint8), target=sidelight.TopK(2))
    first.save(folder)
    written = {each.name: each.read_bytes() for each in folder.iterdir()}
    (folder / "007.png").write_bytes(b"the caller's own")
    second = client.attribute(np.ones((2, *LARGE), np.uint8))
    with pytest.raises(sidelight.exceptions.AlreadyExists, match="this folder already has an answer"):
        second.save(folder)
    assert {each.name: each.read_bytes() for each in folder.iterdir() if each.name != "007.png"} == written
    second.save(folder, overwrite=True)
    names = ["000.png", "001.png", "007.png", "answer.json", "maps.npy"]  # none of the first one's, which had k maps
    assert sorted(each.name for each in folder.iterdir()) == names
    assert np.load(folder / "maps.npy").tobytes() == second.maps.tobytes()


def test_an_answer_is_saved_beside_other_files_and_into_a_folder_that_is_new(
    client: sidelight.Client, tmp_path: Path
) -> None:
    answer = client.attribute(next(large_batches()))
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "made" / "for it"):
        answer.save(folder)
        answer.save(folder, overwrite=True)
        assert {"000.png", "answer.json", "maps.npy"} <= {each.name for each in folder.iterdir()}
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "000.png", "answer.json", "made", "maps.npy", "notes.txt",
    ]  # fmt: skip
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "made" / "for it").stat().st_mode == plain.stat().st_mode


def test_what_cannot_be_drawn_is_left_out_with_the_reason(
    client: sidelight.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = client.attribute(np.zeros((2, *LARGE), np.uint8))
    real, message = EncodedBatch.picture, "images: drawing a DICOM file needs pydicom: pip install 'sidelight[dicom]'"

    def picture(self: EncodedBatch, example: int, **options: object) -> Image.Image:
        if example == 0:
            raise sidelight.InvalidArgument(message)
        return real(self, example, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(EncodedBatch, "picture", picture)
    answer.save(tmp_path / "why")
    assert sorted(each.name for each in (tmp_path / "why").iterdir()) == ["001.png", "answer.json", "maps.npy"]
    examples = json.loads((tmp_path / "why" / "answer.json").read_text())["examples"]
    assert [each["overlay_missing"] for each in examples] == [message, None]
    assert [each["overlays"] for each in examples] == [None, ["001.png"]]


def test_an_answer_without_its_images_is_saved_without_overlays(client: sidelight.Client, tmp_path: Path) -> None:
    first, _ = client.stream([np.zeros(LARGE, np.uint8)] * 2, ordered=True)
    first.save(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["answer.json", "maps.npy"]
    (example,) = json.loads((tmp_path / "answer.json").read_text())["examples"]
    assert "no longer has its images" in example["overlay_missing"]


def test_an_answer_that_cannot_be_written_leaves_nothing_behind(
    client: sidelight.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = client.attribute(np.zeros((2, *LARGE), np.uint8))

    def full(self: Image.Image, path: Path, **_: object) -> None:
        if "001" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        answer.save(tmp_path / "new")
    with pytest.raises(OSError, match="No space"):
        answer.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
