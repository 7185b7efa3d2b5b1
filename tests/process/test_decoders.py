"""Files are decoded in processes that end with their call: results, limits of time and memory, and no remains."""

import asyncio
import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import sidelight
from PIL import Image
from sidelight_server import Engine, Files, Request, Settings
from sidelight_server.engine.preparation.decoder_pool import DecoderPool
from sidelight_server.engine.preparation.decoder_process import Fitted
from sidelight_server.engine.request_cost import cost_of
from sidelight_server.errors import InvalidArgument, ResourceExhausted, SidelightError, Unavailable
from sidelight_server.inputs.decode_worker import BYTES_PER_PIXEL, SPARE_BYTES, Order
from sidelight_server.inputs.decoding import decode
from sidelight_server.inputs.preprocessing import Preprocessing

from benchmarks.support.bombs import many_scans
from support import TESTS
from support.models import sized_cnn
from support.servers.processes import counts_memory

ZEROS, ONES = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SIZED = "python:support.models:sized_cnn"
PREPROCESSING = Preprocessing(3, 32, 32, ZEROS, ONES, 40, "bilinear")
ORDER = Order(PREPROCESSING, max_pixels=50_000_000, max_s=60)
SOON = Order(PREPROCESSING, max_pixels=50_000_000, max_s=0.5)
SLOW = many_scans(7000, 3000)  # minutes
UNTIL_S = 60.0  # which decoding such a file would outlast


def file_of(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


GOOD = file_of(noise(48, 64, 3), "PNG")
FORMATS = {
    "png": GOOD,
    "png-16": file_of(noise(48, 64, dtype=np.uint16), "PNG"),
    "png-alpha": file_of(noise(48, 64, 4), "PNG"),
    "jpeg": file_of(noise(48, 64, 3), "JPEG"),
    "jpeg-progressive": file_of(noise(48, 64, 3), "JPEG", progressive=True),
    "webp": file_of(noise(48, 64, 3), "WEBP"),
    "tiff": file_of(noise(48, 64, 3), "TIFF"),
    "tiff-lzw": file_of(noise(48, 64, 3), "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": file_of(noise(48, 64, 3), "TIFF", compression="jpeg"),
    "bmp": file_of(noise(48, 64, 3), "BMP"),
    "gif": file_of(noise(48, 64), "GIF"),
}


def dicom(values: np.ndarray) -> bytes:
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = SecondaryCaptureImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["sidelight"])
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = values.shape
    dataset.PhotometricInterpretation, dataset.SamplesPerPixel = "MONOCHROME2", 1
    dataset.BitsAllocated = 8 * values.itemsize
    if values.dtype == np.float32:
        dataset.FloatPixelData = values.tobytes()
    else:
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 0, 16, 15
        dataset.PixelData = values.tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


FORMATS["dicom"] = dicom(noise(48, 64, dtype=np.uint16))


BEFORE: set[int] = set()  # decoders of servers that other tests left running


@pytest.fixture(autouse=True)
def _before() -> None:
    BEFORE.clear()
    BEFORE.update(child.pid for child in children())


def children(pid: int | None = None) -> list[psutil.Process]:
    """The decoder processes that this process, or the given one, has started since the test began."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.pid not in BEFORE and any("decode_worker" in word for word in child.cmdline()):
                found.append(child)
    return found


def until(is_so: Callable[[], object]) -> None:
    end_s = time.monotonic() + UNTIL_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


async def until_decoding() -> psutil.Process:
    """Wait until a decoder process of this process is busy, and return it."""
    end_s = time.monotonic() + UNTIL_S
    while time.monotonic() < end_s:
        for child in children():
            if child.cpu_times().user > 0.5:  # starting takes less
                return child
        await asyncio.sleep(0.01)
    raise AssertionError("none does")


@contextlib.contextmanager
def decoders(size: int = 1, *, memory_bytes: int | None = None) -> Iterator[DecoderPool]:
    pool = DecoderPool(size, memory_bytes=memory_bytes)
    try:
        yield pool
    finally:
        pool.close()
        assert not children()


def fit(pool: DecoderPool, *files: bytes, order: Order = ORDER) -> list[Fitted]:
    return asyncio.run(pool.fit(files, order))


def assert_fitted(fitted: Fitted, file: bytes, preprocessing: Preprocessing = PREPROCESSING) -> None:
    """Compare with the result of decoding in this process."""
    assert not isinstance(fitted, SidelightError), fitted
    pixels = decode(file, channels=preprocessing.channels, max_pixels=50_000_000, window=preprocessing.window)
    expected, geometry = preprocessing.fit(pixels)
    np.testing.assert_array_equal(fitted[0], expected)
    assert fitted[0].dtype == np.uint8
    assert fitted[1] == geometry


@pytest.mark.parametrize(
    "preprocessing",
    [
        PREPROCESSING,
        Preprocessing(1, 24, 40, (0.0,), (1.0,), "exact", "bicubic", window=(100.0, 3000.0)),
        Preprocessing(4, 48, 64, (*ZEROS, 0.0), (*ONES, 1.0), "none", "nearest"),
    ],
    ids=["color", "gray", "alpha"],
)
def test_a_worker_gives_the_pixels_that_decoding_here_gives(preprocessing: Preprocessing) -> None:
    with decoders(2) as pool:
        fitted = fit(pool, *FORMATS.values(), order=Order(preprocessing, 50_000_000, 60))
        for each, file in zip(fitted, FORMATS.values(), strict=True):
            assert_fitted(each, file, preprocessing)
        assert len(children()) <= 2


def test_a_decoder_process_reports_the_same_errors_as_decoding_in_this_process() -> None:
    files = [b"no picture", GOOD[:90], file_of(noise(300, 200, 3), "PNG")]
    order = Order(PREPROCESSING, max_pixels=50_000, max_s=60)
    with decoders() as pool:
        for failure, file in zip(fit(pool, *files, order=order), files, strict=True):
            with pytest.raises(InvalidArgument) as here:
                decode(file, channels=3, max_pixels=50_000)
            assert type(failure) is InvalidArgument
            assert failure.message == here.value.message


def damaged() -> Iterator[bytes]:
    """Files of every format, truncated and with flipped bits."""
    random = np.random.default_rng(1)
    for file in FORMATS.values():
        for _ in range(12):
            yield file[: random.integers(1, len(file))]
            turned = bytearray(file)
            for place in random.integers(0, min(len(file), 400), random.integers(1, 6)):
                turned[place] ^= 1 << random.integers(8)
            yield bytes(turned)


def test_damaged_files_give_pixels_or_a_documented_error_and_write_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with decoders(2) as pool:
        for fitted in fit(pool, *damaged()):
            assert not isinstance(fitted, SidelightError) or type(fitted) in (InvalidArgument, ResourceExhausted)
        assert_fitted(fit(pool, GOOD)[0], GOOD)
    assert capfd.readouterr() == ("", "")


def test_a_file_that_takes_long_fails_alone() -> None:
    with decoders() as pool:
        first, slow, last = fit(pool, GOOD, SLOW, GOOD, order=SOON)
        assert_fitted(first, GOOD)
        assert_fitted(last, GOOD)
    assert isinstance(slow, InvalidArgument)
    assert slow.message == "image file: decoding took more than 0.5 s of CPU time (max_decode_s)"


def test_requests_of_slow_files_take_turns_with_others() -> None:
    async def ask() -> None:
        hostile = [asyncio.create_task(pool.fit([SLOW] * 50, SOON)) for _ in range(2)]
        await until_decoding()
        for _ in range(2):
            assert_fitted((await pool.fit([GOOD], ORDER))[0], GOOD)
        assert not any(each.done() for each in hostile)
        for each in hostile:
            each.cancel()
        await asyncio.wait(hostile)

    with decoders() as pool:
        asyncio.run(ask())


def test_callers_take_turns_however_many_requests_one_brings() -> None:
    async def ask() -> None:
        hostile = [asyncio.create_task(pool.fit([SLOW], SOON, "hostile")) for _ in range(8)]
        await until_decoding()
        assert_fitted((await pool.fit([GOOD], ORDER, "good"))[0], GOOD)
        assert sum(each.done() for each in hostile) <= 3  # the one that ran, and those that were until this one asked
        for each in hostile:
            each.cancel()
        await asyncio.wait(hostile)

    with decoders() as pool:
        asyncio.run(ask())


def test_a_waiting_file_is_released_when_its_call_is_cancelled() -> None:
    async def ask() -> None:
        hostile = asyncio.create_task(pool.fit([SLOW], ORDER))
        await until_decoding()
        file = GOOD + b"of its own"
        before = sys.getrefcount(file)
        waiting = asyncio.create_task(pool.fit([file], ORDER))
        await asyncio.sleep(0.1)  # it is in the queue
        assert sys.getrefcount(file) > before
        waiting.cancel()
        await asyncio.wait([waiting])
        del waiting
        gc.collect()
        assert sys.getrefcount(file) == before
        hostile.cancel()
        await asyncio.wait([hostile])

    with decoders() as pool:
        asyncio.run(ask())


def test_cancelling_ends_the_decoder() -> None:
    async def ask() -> None:
        asked = asyncio.create_task(pool.fit([SLOW], ORDER))
        decoder = await until_decoding()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await asyncio.to_thread(until, lambda: not decoder.is_running())
        assert_fitted((await pool.fit([GOOD], ORDER))[0], GOOD)

    with decoders() as pool:
        asyncio.run(ask())


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (signal.SIGSEGV, InvalidArgument, "image file: its decoder crashed on it"),
        (
            signal.SIGKILL,
            ResourceExhausted,
            "image file: the system ended its decoder, as it does if memory is short",
        ),
    ],
)
def test_a_decoder_that_dies_fails_its_file_alone(number: int, kind: type[SidelightError], message: str) -> None:
    async def ask() -> tuple[Fitted, ...]:
        asked = asyncio.create_task(pool.fit([GOOD, SLOW, GOOD], ORDER))
        (await until_decoding()).send_signal(number)
        return tuple(await asked)

    with decoders() as pool:
        first, failure, last = asyncio.run(ask())
    assert_fitted(first, GOOD)
    assert_fitted(last, GOOD)
    assert type(failure) is kind
    assert failure.message == message


def test_a_decoder_is_kept_whatever_it_decoded() -> None:
    with decoders() as pool:
        fit(pool, GOOD)
        kept = children()
        for _ in range(2):
            for file in (*FORMATS.values(), b"no picture", GOOD[:90]):
                fit(pool, file)
                assert children() == kept


def test_a_decoder_that_died_between_two_files_is_replaced() -> None:
    with decoders() as pool:
        fit(pool, GOOD)
        for child in children():
            child.kill()
            until(lambda child=child: child.status() == psutil.STATUS_ZOMBIE)
        assert_fitted(fit(pool, GOOD)[0], GOOD)


def test_closing_ends_what_is_being_decoded() -> None:
    async def ask() -> None:
        asked = asyncio.create_task(pool.fit([SLOW] * 3, ORDER))
        await until_decoding()
        await asyncio.to_thread(pool.close)
        with pytest.raises(Unavailable):
            await asked

    with decoders() as pool:
        asyncio.run(ask())
        with pytest.raises(Unavailable):
            fit(pool, GOOD)


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
        assert side * side < grown < BYTES_PER_PIXEL * side * side  # it was decoded there, and not here
        assert psutil.Process(decoder.pid).memory_info().rss < before + SPARE_BYTES  # and given back


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


def test_a_decoder_imports_neither_torch_nor_the_callers_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import io, sys
        from pathlib import Path
        print("imported")
        import psutil, sidelight, sidelight_server, torch
        from PIL import Image
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        with sidelight_server.serve(sidelight_server.ModelSpec(module, input_size=(3, 8, 8)), device="cpu") as address:
            with sidelight.connect(address) as client:
                client.attribute([file.getvalue()])
            [child] = psutil.Process().children()
            assert not any("torch" in each.path for each in child.memory_maps())
        assert not psutil.Process().children()
    """)
    )  # without a guard for __main__
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr


# The engine and the command


def engine(**settings: object) -> Engine:
    return Engine([sized_cnn()], Settings(device="cpu", **settings))


def test_good_callers_are_answered_beside_one_of_slow_files() -> None:
    async def ask(engine: Engine) -> None:
        hostile = asyncio.create_task(engine.attribute(Request(Files((GOOD, SLOW, GOOD)))))
        good = await asyncio.gather(*(engine.attribute(Request(Files((GOOD,) * 3))) for _ in range(8)))
        assert not any(each.failures for each in good)
        failures = (await hostile).failures
        assert [(each.example, each.code) for each in failures] == [(1, InvalidArgument.code)]

    with engine(threads=2, max_decode_s=0.5) as running:
        asyncio.run(ask(running))
    assert not children()


def test_pixels_do_not_wait_for_files() -> None:
    async def ask(engine: Engine) -> None:
        hostile = asyncio.create_task(engine.attribute(Request(Files((SLOW,) * 4))))
        await until_decoding()
        assert not (await engine.attribute(Request(noise(2, 48, 64, 3)))).failures
        assert not hostile.done()
        hostile.cancel()
        await asyncio.wait([hostile])

    with engine(threads=1, max_decode_s=100) as running:
        asyncio.run(ask(running))


def test_the_pixels_that_files_become_count_in_the_permit() -> None:
    running = engine()
    version = running.registry.serving("")
    held = [sum(cost_of(Request(Files((GOOD,) * n)), version[0])[:2]) for n in (1, 9)]
    floats = [sum(cost_of(Request(np.zeros((n, 3, 32, 32), np.float32)), version[0])[:2]) for n in (1, 9)]
    # Once for each picture, and once more when the batch is made of them.
    assert (held[1] - held[0]) - (floats[1] - floats[0]) == 2 * 8 * 3 * 32 * 32


def test_an_engine_without_files_starts_no_process() -> None:
    with engine() as running:
        asyncio.run(running.attribute(Request(noise(2, 48, 64, 3))))
        assert not children()


def serving(tmp_path: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    address = f"unix:{tmp_path}/socket"
    command = [sys.executable, "-m", "sidelight_server", "--model", SIZED, "--listen", address]
    command += ["--device", "cpu", "--metrics-listen", "", *flags]
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    while "event=serving" not in (line := process.stderr.readline()):
        assert line
    return process, address


@contextlib.contextmanager
def asked_for(address: str, file: bytes) -> Iterator[None]:
    """A caller who waits for a file's map."""

    async def ask() -> None:
        async with sidelight.aio.connect(address, connect_timeout=10, retry=False) as client:
            with contextlib.suppress(sidelight.SidelightError):
                await client.attribute([file], timeout=100)

    with _in_thread(ask()):
        yield


@contextlib.contextmanager
def _in_thread(coroutine: Coroutine[Any, Any, None]) -> Iterator[None]:
    thread = threading.Thread(target=asyncio.run, args=(coroutine,))
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_a_server_is_the_end_of_its_decoders(tmp_path: Path, number: int) -> None:
    process, address = serving(tmp_path, "--max-decode-s", "1000", "--drain-s", "1", "--threads", "2")
    with process, asked_for(address, SLOW):
        until(lambda: len(children(process.pid)) == 2)  # started with the server, the second perhaps a little later
        until(lambda: any(each.cpu_times().user > 0.5 for each in children(process.pid)))
        decoders = children(process.pid)
        process.send_signal(number)
        assert process.wait(UNTIL_S) == (0 if number == signal.SIGTERM else -number)
        assert not psutil.wait_procs(decoders, UNTIL_S)[1]
