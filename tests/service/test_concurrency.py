"""Many concurrent callers: every map equals the serial one, with any neighbors."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch

from support.models import small_cnn
from support.tolerances import GPU, NEIGHBORS

N_THREADS, N_CALLS = 8, 25
# An example's place and neighbors in a chunk may choose another summation order: about 1e-6 of a map's maximum on the
# CPU. A GPU's library may choose another convolution algorithm for another chunk.
SHARES = {"cpu": NEIGHBORS, "cuda": GPU, "mps": GPU}
SHARE = 0.0


@pytest.fixture(autouse=True)
def _share(device: str) -> None:
    global SHARE
    SHARE = SHARES[device.partition(":")[0]]


@pytest.fixture
def serving(device: str) -> Iterator[sidelight.Client]:
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32))
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        yield client


def assert_close(maps: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(maps, expected, rtol=0, atol=SHARE * expected.max())


def test_eight_threads_get_the_serial_maps(serving: sidelight.Client) -> None:
    """A kernel that called `zero_grad()` and `.backward()` on the shared module would crash, or mix maps, here."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (1 + i % 3, 32, 32, 3), np.uint8) for i in range(16)]
    options = [{"target": i % 10 if i % 2 else None, "score": ("probability", "logit")[i % 2]} for i in range(16)]
    expected = [serving.attribute(images[i], **options[i]).maps for i in range(16)]

    def call(n: int) -> None:
        i = n % 16
        assert_close(serving.attribute(images[i], **options[i]).maps, expected[i])

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(call, range(N_THREADS * N_CALLS)))


def test_with_chunks_of_one_row_eight_threads_get_the_serial_maps_to_the_last_bit(device: str) -> None:
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32))
    images = [np.random.default_rng(i).integers(0, 256, (1 + i % 3, 32, 32, 3), np.uint8) for i in range(16)]
    with (
        sidelight_server.serve(spec, device=device, max_chunk_rows=1) as address,
        sidelight.connect(address) as client,
        ThreadPoolExecutor(N_THREADS) as pool,
    ):
        expected = [client.attribute(each).maps for each in images]
        for n, answer in enumerate(pool.map(lambda n: client.attribute(images[n % 16]), range(N_THREADS * N_CALLS))):
            np.testing.assert_array_equal(answer.maps, expected[n % 16])


def test_streams_and_calls_side_by_side_get_the_serial_maps(serving: sidelight.Client) -> None:
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (1 + i % 5, 32, 32, 3), np.uint8) for i in range(40)]
    expected = [serving.attribute(each).maps for each in images]

    def stream() -> None:
        answers = list(serving.stream(images))
        assert sorted(answer.index for answer in answers) == list(range(len(images)))
        for answer in answers:
            assert_close(answer.maps, expected[answer.index])

    def calls() -> None:
        for image, maps in zip(images, expected, strict=True):
            assert_close(serving.attribute(image).maps, maps)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(each) for each in (stream, stream, calls, calls)]:
            done.result()


def test_an_example_has_the_same_map_at_every_index_and_with_any_neighbors(serving: sidelight.Client) -> None:
    rng = np.random.default_rng(2)
    example = rng.integers(0, 256, (32, 32, 3), np.uint8)
    alone = serving.attribute(example).maps[0]
    for place in range(8):
        neighbors = rng.integers(0, 256, (8, 32, 32, 3), np.uint8)
        neighbors[place] = example
        assert_close(serving.attribute(neighbors).maps[place], alone)


def test_one_thread_owns_the_device(device: str, floats: torch.Tensor) -> None:
    seen: set[str] = set()

    class Watching(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_cnn()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add(threading.current_thread().name)
            return self.inner(x)

    with (
        sidelight_server.serve(Watching(), device=device) as address,
        sidelight.connect(address) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        list(pool.map(lambda _: client.attribute(floats), range(20)))
    assert len(seen) == 1
    assert seen.pop().startswith("sidelight-")
