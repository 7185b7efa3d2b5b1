"""Decoder processes: files to decode, and ways to see which processes there are."""

import asyncio
import contextlib
import io
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
from PIL import Image
from sidelight_server.engine.preparation.decoder_pool import DecoderPool
from sidelight_server.engine.preparation.decoder_process import Fitted
from sidelight_server.errors import SidelightError
from sidelight_server.inputs.decode_worker import Order
from sidelight_server.inputs.decoding import decode
from sidelight_server.inputs.preprocessing import Preprocessing

from benchmarks.support.bombs import many_scans

ZEROS, ONES = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
PREPROCESSING = Preprocessing(3, 32, 32, ZEROS, ONES, 40, "bilinear")
ORDER = Order(PREPROCESSING, max_pixels=50_000_000, max_s=60)
SLOW = many_scans(7000, 3000)  # minutes
UNTIL_S = 60.0  # decoding such a file takes longer


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
            if child.cpu_times().user > 0.5:  # longer than a process takes to start
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
