"""Shared memory in the client: the maps are the same, and no file remains."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
from hypothesis import given
from hypothesis import strategies as st
from sidelight._transport.shared_memory import ALIGNMENT, Allocator, Region

from support.tolerances import NEIGHBORS

SHM = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in memory, or on disk where there is none: the protocol is the same."""
    return tmp_path


@pytest.fixture
def shared(spec: sidelight_server.ModelSpec, device: str, folder: Path) -> Iterator[sidelight.Client]:
    with (
        sidelight_server.serve(spec, device=device, shared_memory=folder) as address,
        sidelight.connect(address, connect_timeout=10, shared_memory=True) as client,
    ):
        yield client


def floats(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("map_dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("kind", ["floats", "pixels", "files", "nothing"])
def test_the_maps_are_those_that_travel_inline(
    shared: sidelight.Client, client: sidelight.Client, kind: str, map_dtype: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), np.uint8)
    images = {"floats": floats(3), "pixels": pixels, "files": [Path("tests/none")], "nothing": floats(0)}[kind]
    if kind == "files":
        images = list(map(_encoded, pixels))
    answer, expected = (each.attribute(images, map_dtype=map_dtype, channels="l2") for each in (shared, client))
    assert answer.maps.tobytes() == expected.maps.tobytes()
    assert answer.maps.shape == expected.maps.shape
    assert answer.predictions == expected.predictions
    assert expected.transport == "inline"
    assert answer.transport == ("shared_memory" if kind in ("floats", "pixels") else "inline")
    if len(images):
        assert answer.overlay(0).tobytes() == expected.overlay(0).tobytes()


def _encoded(pixels: np.ndarray) -> bytes:
    from PIL import Image
    from sidelight._inputs.images import _encoded

    return _encoded(Image.fromarray(pixels))


def test_batches_of_all_sizes_go_through_regions_that_grow(shared: sidelight.Client, client: sidelight.Client) -> None:
    batches = [floats(1 + (i * 7) % 40, i) for i in range(60)]
    for answer in shared.stream(batches):
        assert answer.transport == "shared_memory"
        expected = client.attribute(batches[answer.index]).maps
        np.testing.assert_allclose(answer.maps, expected, rtol=0, atol=NEIGHBORS * expected.max())


def test_nothing_remains_of_a_stream(shared: sidelight.Client, folder: Path) -> None:
    list(shared.stream([floats(2)]))
    before = len(os.listdir("/proc/self/fd"))  # of the client, and of the server in the same process
    for answer in shared.stream([floats(4)] * 20):
        assert list(folder.iterdir()) == []  # the file lost its name before it was used
        if answer.index == 10:
            break
    for _ in range(5):
        list(shared.stream([floats(2), floats(30)]))
    until_s = time.monotonic() + 30
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < until_s:
        shared.info()  # the server handles the end of a stream a moment later
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_failed_batch_releases_its_memory(shared: sidelight.Client) -> None:
    images = floats(4)
    images[2] = np.nan
    answers = list(shared.stream([images] * 50, on_error="return"))
    assert [[each.example for each in answer.failures] for answer in answers] == [[2]] * 50
    refused = list(shared.stream([floats(4)] * 50, target=99, on_error="return"))
    assert {type(answer.error) for answer in refused} == {sidelight.InvalidArgument}
    assert len(shared.attribute(floats(4))) == 4


def test_partial_maps_travel_inline_and_the_last_one_through_the_region(shared: sidelight.Client) -> None:
    method = sidelight.SmoothGrad(samples=200)
    answers = list(shared.stream([floats(1)], method=method, partial=True))
    assert [answer.final for answer in answers] == [False] * (len(answers) - 1) + [True]
    assert answers[-1].transport == "shared_memory"


@pytest.mark.parametrize("way", ["attribute", "stream"])
def test_shared_memory_on_a_server_without_it_is_refused_instead_of_sent_inline(address: str, way: str) -> None:
    with (
        sidelight.connect(address, connect_timeout=10, shared_memory=True) as client,
        pytest.raises(sidelight.FailedPrecondition, match="--shared-memory"),
    ):
        client.attribute(floats(1)) if way == "attribute" else list(client.stream([floats(1)]))


@pytest.mark.parametrize("named", ["/nowhere/shm", Path("/nowhere/shm")], ids=["text", "path"])
def test_a_folder_that_is_not_here_is_named(shared: sidelight.Client, named: str | Path) -> None:
    with (
        sidelight.connect(shared.address, connect_timeout=10, shared_memory=named) as client,
        pytest.raises(sidelight.FailedPrecondition, match="/nowhere/shm"),
    ):
        client.attribute(floats(1))


def test_a_folder_that_is_not_the_servers_is_refused_by_the_server(shared: sidelight.Client, tmp_path: Path) -> None:
    (other := tmp_path / "other").mkdir()
    with (
        sidelight.connect(shared.address, connect_timeout=10, shared_memory=str(other)) as client,
        pytest.raises(sidelight.NotFound, match="region"),
    ):
        client.attribute(floats(1))
    assert list(other.iterdir()) == []


def test_a_batch_over_the_servers_limit_of_a_region_goes_in_parts(
    spec: sidelight_server.ModelSpec, device: str, folder: Path, client: sidelight.Client
) -> None:
    with (
        sidelight_server.serve(spec, device=device, shared_memory=folder, max_region_bytes=20_000) as address,
        sidelight.connect(address, connect_timeout=10, shared_memory=True) as shared,
    ):
        np.testing.assert_allclose(shared.attribute(floats(9)).maps, client.attribute(floats(9)).maps, atol=1e-6)
        with pytest.raises(sidelight.exceptions.MessageTooLarge, match="max_region_bytes"):
            shared.attribute(floats(1), channels="none")


def test_a_region_is_released_once_and_not_while_it_is_read(folder: Path) -> None:
    region = Region(folder, 1000)
    region.write(np.arange(10, dtype=np.uint8), 20)
    assert region.read(10, 20).tolist() == list(range(10))
    mapped = region._mapped()
    region.close()
    assert mapped[20:30].tolist() == list(range(10))
    region.close()
    with pytest.raises(sidelight.exceptions.Cancelled):
        region.read(1, 0)
    assert list(folder.iterdir()) == []


def test_a_region_that_does_not_fit_is_refused_and_leaves_no_file(folder: Path) -> None:
    with pytest.raises(sidelight.ResourceExhausted, match=str(2**60)):
        Region(folder, 2**60)
    assert list(folder.iterdir()) == []


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 300)), max_size=60))
def test_ranges_of_an_arena_never_overlap_and_all_of_it_comes_back(acts: list[tuple[bool, int]]) -> None:
    allocator, taken = Allocator(1000), {}
    for gives_back, n in acts:
        if gives_back and taken:
            start = sorted(taken)[n % len(taken)]
            allocator.free(start)
            del taken[start]
        elif (start := allocator.take(n + 1)) is not None:
            assert start % ALIGNMENT == 0
            assert start + n + 1 <= 1000
            assert all(start + n + 1 <= other or start >= other + size for other, size in taken.items())
            taken[start] = n + 1
    for start in taken:
        allocator.free(start)
    assert (allocator.n_taken, allocator.take(1000)) == (0, 0)
