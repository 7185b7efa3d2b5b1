"""DICOM files that contradict themselves, are damaged, or need a codec are refused."""

import io
import struct
import zlib

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
)
from sidelight_server.errors import InvalidArgument
from sidelight_server.inputs.decoding import decode

from support.pictures.dicom_files import FOLDER, RAMP, READ, read, refusal, table, to_file, written
from support.profiles import n_examples
from support.servers.processes import counts_memory, refused_apart

# Both sides let pydicom say what it likes; pytest would make errors of that.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def deflated(file: bytes) -> bytes:
    """The same data set in the deflated syntax, and a gigabyte of zeros after it."""
    dataset = pydicom.dcmread(io.BytesIO(file))
    whole = to_file(dataset, DeflatedExplicitVRLittleEndian)
    return whole + zlib.compress(bytes(1 << 20))


def rle(frame: bytes, **elements: object) -> bytes:
    return written(RAMP.astype(np.uint8), RLELossless, PixelData=encapsulate([frame]), **elements)


def jpeg(height: int, width: int) -> bytes:
    """A DICOM file of 64 × 64 with a JPEG of another size."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    image = buffer.getvalue()
    at = image.index(b"\xff\xc0") + 5
    frame = image[:at] + struct.pack(">HH", height, width) + image[at + 4 :]
    return written(RAMP.astype(np.uint8), JPEGBaseline8Bit, PixelData=encapsulate([frame]))


def lut_of(bits: int) -> Dataset:
    return table(np.arange(16), bits=bits)


LIES = {
    "rows": (written(RAMP, Rows=65535, Columns=65535), "max_image_pixels is 50,000,000"),
    "more-rows-than-data": (written(RAMP, Rows=6000), "broken or truncated DICOM"),
    "no-rows": (written(RAMP, Rows=0), "broken or truncated DICOM"),
    "frames": (written(RAMP, NumberOfFrames=0), ""),
    "slope": (written(RAMP, RescaleSlope="1e400", RescaleIntercept="0"), "not finite"),
    "jpeg": (jpeg(60000, 60000), "DICOM of 64 × 64 pixels, its frame has 60,000 × 60,000"),
    "jpeg-smaller": (jpeg(8, 8), "DICOM of 64 × 64 pixels, its frame has 8 × 8"),
    "no-jpeg": (
        written(RAMP.astype(np.uint8), JPEGBaseline8Bit, PixelData=encapsulate([b"no jpeg at all"])),
        "its frame has an unknown number",
    ),
    "rle": (rle(struct.pack("<16L", 1, 64, *[0] * 14) + b"\x81\x00" * 100_000), "unpacks into more"),
    "rle-of-the-same-bytes": (rle(struct.pack("<16L", 15, *[64] * 15) + b"\x81\x00" * 16), ""),
    "rle-header": (rle(b"short"), "broken or truncated"),
    "deflated": (deflated(written(RAMP)), "Deflated Explicit VR Little Endian, which is not supported"),
    "table-of-another-type": (written(RAMP, VOILUTSequence=Sequence([lut_of(99)])), "broken or truncated"),
    "colors": (
        written(np.zeros((4, 5, 3), np.uint8), PhotometricInterpretation="HSV"),
        "DICOM of HSV uint8 [4, 5, 3]",
    ),
    "no-picture": (to_file(Dataset(), ExplicitVRLittleEndian), "DICOM without a picture"),
    "nothing": (bytes(128) + b"DICM", ""),
}


@pytest.mark.parametrize(("file", "message"), LIES.values(), ids=LIES.keys())
def test_a_file_that_contradicts_itself_is_refused(file: bytes, message: str) -> None:
    if message:
        assert message in refusal(file)
        return
    try:
        read(file)
    except InvalidArgument as error:
        assert error.message.startswith("image file: ")  # noqa: PT017


def test_a_syntax_without_a_codec_is_named() -> None:
    path = FOLDER / "test_files" / "SC_rgb_jpeg_gdcm.dcm"
    assert refusal(path.read_bytes()) == (
        "image file: DICOM in JPEG Lossless, Non-Hierarchical, First-Order Prediction "
        "(Process 14 [Selection Value 1]), which this server has no codec for"
    )


@counts_memory
def test_inconsistent_files_take_no_memory_and_cause_no_warning() -> None:
    files = [*(file for file, _ in LIES.values()), (FOLDER / "test_files/badVR.dcm").read_bytes()]
    messages, grown_kib = refused_apart(files, "pydicom.pixels")
    assert len(messages) >= len(LIES) - 3
    assert grown_kib < 50_000  # what they claim is gigabytes


SMALL = [path.read_bytes() for path in READ if path.stat().st_size < 70_000]


def read_or_refuse(file: bytes) -> None:
    try:
        decoded = decode(file, channels=3, max_pixels=100_000)
    except InvalidArgument as error:
        assert error.message.startswith("image file: ")  # noqa: PT017
    else:
        assert decoded.shape[2] == 3


@settings(max_examples=n_examples(300))
@given(
    st.sampled_from(SMALL), st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=4)), max_size=6)
)
def test_a_damaged_file_raises_nothing_but_invalid_argument(file: bytes, damages: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(file)
    for where, what in damages:
        at = 132 + where % min(len(file) - 132, 3000)  # where the elements are, and the pixels begin
        damaged[at : at + len(what)] = what
    read_or_refuse(bytes(damaged))


@settings(max_examples=n_examples(150))
@given(st.sampled_from(SMALL), st.floats(0, 1))
def test_a_file_cut_anywhere_is_refused_or_read(file: bytes, share: float) -> None:
    read_or_refuse(file[: round(len(file) * share)])


@settings(max_examples=n_examples(200))
@given(st.binary(max_size=300))
def test_random_bytes_after_the_mark_are_refused(rest: bytes) -> None:
    read_or_refuse(bytes(128) + b"DICM" + rest)
