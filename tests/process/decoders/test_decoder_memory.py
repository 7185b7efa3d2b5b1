"""The memory of decoder processes: its bound, and pictures that wait for it."""

import asyncio
from pathlib import Path

import numpy as np
import psutil
from sidelight_server.errors import ResourceExhausted, SidelightError
from sidelight_server.inputs.decode_worker import BYTES_PER_PIXEL, SPARE_BYTES, Order

from support.servers.decoders import (
    FORMATS,
    GOOD,
    ORDER,
    PREPROCESSING,
    SLOW,
    assert_fitted,
    children,
    decoders,
    dicom,
    file_of,
    fit,
    noise,
    until_decoding,
)
from support.servers.processes import counts_memory


@counts_memory
def test_a_picture_of_many_pixels_stays_within_the_bound() -> None:
    side = 7071
    rows = np.linspace(0, 65535, side).astype(np.uint16)
    file = file_of(np.broadcast_to(rows, (side, side)).copy(), "PNG")
    with decoders() as pool:
        fit(pool, GOOD)
        [decoder] = children()
        before = _peak_bytes(decoder.pid)
        assert not isinstance(fit(pool, file)[0], SidelightError)
        grown = _peak_bytes(decoder.pid) - before
        assert side * side < grown < BYTES_PER_PIXEL * side * side  # the decoder process decoded it, not this one
        assert psutil.Process(decoder.pid).memory_info().rss < before + SPARE_BYTES  # and released


SCARCE_BYTES = 100 * 2**20  # of memory: each of two workers may decode a megapixel, which is the least


@counts_memory
def test_where_memory_is_scarce_one_large_picture_is_decoded_at_a_time_and_small_ones_meanwhile() -> None:
    def n_of_large_limit() -> int:
        return sum(child.rlimit(psutil.RLIMIT_AS)[0] > BYTES_PER_PIXEL * ORDER.max_pixels for child in children())

    async def ask() -> None:
        large = [asyncio.create_task(pool.fit([SLOW], ORDER, caller)) for caller in "abc"]
        await until_decoding()
        for _ in range(20):
            assert_fitted((await pool.fit([GOOD], ORDER, "good"))[0], GOOD)
            assert n_of_large_limit() == 1
        assert len(children()) <= 3
        for each in large:
            each.cancel()
        await asyncio.wait(large)

    with decoders(2, memory_bytes=SCARCE_BYTES) as pool:
        asyncio.run(ask())


def test_scarce_memory_changes_no_picture_and_no_error() -> None:
    large = [file_of(noise(1000, 1200, 3), "PNG"), file_of(noise(1000, 1200, 3), "WEBP"), dicom(noise(1200, 1000))]
    files = [*FORMATS.values(), *large, b"no picture", GOOD[:90], file_of(noise(2000, 1000), "PNG")]
    order = Order(PREPROCESSING, max_pixels=1_600_000, max_s=60)
    with decoders(2) as pool:
        expected = fit(pool, *files, order=order)
    with decoders(2, memory_bytes=SCARCE_BYTES) as pool:
        fitted = fit(pool, *files, order=order)
    for one, other in zip(expected, fitted, strict=True):
        if isinstance(one, SidelightError):
            assert (type(other), str(other)) == (type(one), str(one))
        else:
            assert not isinstance(other, SidelightError), other
            np.testing.assert_array_equal(other[0], one[0])
            assert other[1] == one[1]


@counts_memory
def test_a_picture_that_takes_too_much_memory_is_refused_and_the_next_one_is_decoded() -> None:
    side = 4500  # floats, which take 22 bytes a pixel
    file = dicom(noise(side, side, dtype=np.uint16).astype(np.float32))
    with decoders() as pool:
        failure, good = fit(pool, file, GOOD, order=Order(PREPROCESSING, max_pixels=side * side, max_s=60))
        assert_fitted(good, GOOD)
    assert isinstance(failure, ResourceExhausted), failure
    assert "MiB that decoding may take here" in failure.message


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
