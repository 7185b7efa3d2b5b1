"""Decoding of DICOM files, compared with pydicom's own steps, on its test files, whole and damaged."""

import builtins
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import sidelight
import sidelight_server
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
)
from sidelight.visualization import dicom as _dicom
from sidelight_server.errors import FailedPrecondition, InvalidArgument
from sidelight_server.inputs import dicom
from sidelight_server.inputs.decoding import decode

from support.models import small_cnn
from support.profiles import n_examples
from support.servers.processes import counts_memory, refused_apart

# Both sides let pydicom say what it likes; pytest would make errors of that.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

LIMIT = 50_000_000
FOLDER = Path(pydicom.__file__).parent / "data"
FILES = sorted(
    (path for path in FOLDER.rglob("*") if path.is_file() and path.read_bytes()[128:132] == b"DICM"), key=str
)
RAMP = np.arange(4096, dtype=np.int16).reshape(64, 64)


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def read(file: bytes, window: tuple[float, float] | None = None, *, max_pixels: int = LIMIT) -> np.ndarray:
    return dicom.read(file, max_pixels=max_pixels, window=window)


def refusal(file: bytes, **options: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        read(file, **options)
    return caught.value.message


def written(frame: np.ndarray, syntax: str = ExplicitVRLittleEndian, **elements: object) -> bytes:
    """A file of one frame, [H, W] or [H, W, 3]; `elements` replace its own attributes."""
    dataset = Dataset()
    dataset.Rows, dataset.Columns = frame.shape[:2]
    dataset.SamplesPerPixel = 3 if frame.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if frame.ndim == 3 else "MONOCHROME2"
    if frame.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = 8 * frame.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(frame.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset.PixelData = frame.astype(frame.dtype.newbyteorder(order)).tobytes()
    dataset["PixelData"].VR = "OB" if frame.itemsize == 1 else "OW"
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return to_file(dataset, syntax)


def to_file(dataset: Dataset, syntax: str) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    buffer = io.BytesIO()
    pydicom.dcmwrite(
        buffer, dataset, enforce_file_format=True,
        implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=syntax != ExplicitVRBigEndian,
    )  # fmt: skip
    return buffer.getvalue()


def table(entries: np.ndarray, *, bits: int, first: int = 0) -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", [int(each) for each in entries])
    return item


def spread(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.round(np.clip((np.asarray(values, np.float64) - low) * 255 / (high - low), 0, 255))


def oracle(file: bytes) -> np.ndarray:
    """What pydicom's own steps give for gray: the modality's, the window's over its whole range, then 8 bits."""
    dataset = pydicom.dcmread(io.BytesIO(file))
    frame = pixel_array(dataset, index=0)
    values = apply_modality_lut(frame, dataset)
    if dataset.get("VOILUTSequence"):
        low, high = 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
        shown = apply_voi_lut(values.astype(np.int64), dataset)
    elif dataset.get("WindowWidth") is not None:
        stored = [0, 2**dataset.BitsStored - 1] if not dataset.PixelRepresentation else None
        stored = stored or [-(2 ** (dataset.BitsStored - 1)), 2 ** (dataset.BitsStored - 1) - 1]
        slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
        low, high = (float(each * slope + intercept) for each in stored)
        shown = apply_voi_lut(values, dataset)
    else:
        low, high, shown = values.min(), values.max(), values
    pixels = spread(shown, float(low), float(high)) if low < high else np.zeros(shown.shape)
    return 255 - pixels if dataset.PhotometricInterpretation == "MONOCHROME1" else pixels


def is_read(file: bytes) -> bool:
    try:
        read(file)
    except InvalidArgument:
        return False
    return True


READ = [path for path in FILES if is_read(path.read_bytes())]


@pytest.mark.parametrize("path", READ, ids=name)
def test_real_files_are_what_pydicom_makes_of_them(path: Path) -> None:
    file = path.read_bytes()
    dataset = pydicom.dcmread(path)
    pixels = read(file)
    assert pixels.dtype == np.uint8
    assert pixels.shape[:2] == (dataset.Rows, dataset.Columns)
    if pixels.ndim == 2:
        np.testing.assert_allclose(pixels, oracle(file), rtol=0, atol=1)  # where a tie falls, the last bit decides
        return
    frame = pixel_array(dataset, index=0)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        frame = pydicom.pixels.apply_color_lut(frame, dataset)
    np.testing.assert_array_equal(pixels, spread(frame, 0, np.iinfo(frame.dtype).max))


def test_enough_real_files_are_read_of_every_kind() -> None:
    kinds = {pydicom.dcmread(path).PhotometricInterpretation for path in READ}
    assert len(READ) > 50
    assert kinds >= {"MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "PALETTE COLOR"}


@pytest.mark.parametrize("path", sorted((path for path in FOLDER.rglob("*") if path.is_file()), key=str), ids=name)
def test_no_real_file_ends_in_another_error(path: Path) -> None:
    try:
        decoded = decode(path.read_bytes(), channels=3, max_pixels=LIMIT)
    except (InvalidArgument, FailedPrecondition) as error:
        assert error.message.startswith("image file: ")  # noqa: PT017
    else:
        assert decoded.shape[2] == 3


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize(
    "dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32], ids=lambda t: t.__name__
)
def test_without_a_window_a_frame_spans_black_to_white(dtype: type, syntax: str) -> None:
    info = np.iinfo(dtype)
    frame = np.linspace(info.min, info.max, 64 * 64).astype(dtype).reshape(64, 64)
    np.testing.assert_array_equal(read(written(frame, syntax)), spread(frame, info.min, info.max))


def test_a_frame_of_one_value_is_black_as_it_is_displayed() -> None:
    flat = np.full((5, 6), 700, np.uint16)
    assert (read(written(flat)) == 0).all()
    assert (read(written(flat, PhotometricInterpretation="MONOCHROME1")) == 255).all()


WINDOWS: dict[str, tuple[dict[str, object], Callable[[np.ndarray], np.ndarray]]] = {
    # PS3.3 C.11.2.1.2.1: below c − 0.5 − (w − 1) / 2 all is black, above c − 0.5 + (w − 1) / 2 white.
    "linear": ({"WindowCenter": 2048, "WindowWidth": 1001}, lambda v: spread(v, 1547.5, 2547.5)),
    "linear-of-width-1": ({"WindowCenter": 2048, "WindowWidth": 1}, lambda v: np.where(v > 2047.5, 255, 0)),
    "exact": (
        {"WindowCenter": 2048, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"},
        lambda v: spread(v, 1548, 2548),
    ),
    "sigmoid": (
        {"WindowCenter": 2048, "WindowWidth": 1000, "VOILUTFunction": "SIGMOID"},
        lambda v: np.round(255 / (1 + np.exp(-4 * (v - 2048) / 1000))),
    ),
    "first-of-several": ({"WindowCenter": [100, 2000], "WindowWidth": [21, 400]}, lambda v: spread(v, 89.5, 109.5)),
    "of-no-width": ({"WindowCenter": 100, "WindowWidth": 0}, lambda v: spread(v, 0, 4095)),
    "empty": ({"WindowCenter": None, "WindowWidth": None}, lambda v: spread(v, 0, 4095)),
    "table-before-window": (
        {
            "VOILUTSequence": Sequence([table(np.arange(4096)[::-1], bits=12)]),
            "WindowCenter": 100,
            "WindowWidth": 20,
        },
        lambda v: spread(4095 - v, 0, 4095),
    ),
}


@pytest.mark.parametrize(("elements", "expected"), WINDOWS.values(), ids=WINDOWS.keys())
def test_a_files_own_window_is_applied(
    elements: dict[str, object], expected: Callable[[np.ndarray], np.ndarray]
) -> None:
    np.testing.assert_array_equal(read(written(RAMP, **elements)), expected(RAMP))
    turned = read(written(RAMP, **elements, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(turned, 255 - expected(RAMP))


def test_the_specs_window_is_in_modality_units_and_comes_before_the_files_own() -> None:
    elements = {"RescaleSlope": "0.5", "RescaleIntercept": "-1024", "WindowCenter": 40, "WindowWidth": 400}
    hounsfield = RAMP * 0.5 - 1024
    np.testing.assert_array_equal(read(written(RAMP, **elements), (-160, 240)), spread(hounsfield, -160, 240))
    np.testing.assert_array_equal(read(written(RAMP, **elements)), spread(hounsfield, 39.5 - 199.5, 39.5 + 199.5))


def test_a_modality_table_comes_before_the_window() -> None:
    sequence = Sequence([table(np.arange(4096) // 2, bits=16)])
    file = written(RAMP, ModalityLUTSequence=sequence)
    np.testing.assert_array_equal(read(file, (0, 1000)), spread(RAMP // 2, 0, 1000))


def test_only_values_that_are_there_make_the_range() -> None:
    entries = np.arange(4096)
    entries[5], entries[4090] = 1000, 1200  # in the frame; those between them are not
    file = written(np.array([[5, 4090]], np.uint16), ModalityLUTSequence=Sequence([table(entries, bits=16)]))
    np.testing.assert_array_equal(read(file), [[0, 255]])


def test_a_file_of_many_frames_keeps_slope_and_window_in_sequences() -> None:
    values, window, group = Dataset(), Dataset(), Dataset()
    values.RescaleSlope, values.RescaleIntercept = "2", "-1000"
    window.WindowCenter, window.WindowWidth = 0, 101
    group.PixelValueTransformationSequence, group.FrameVOILUTSequence = Sequence([values]), Sequence([window])
    frames = np.stack([RAMP, RAMP[::-1]])
    file = written(
        RAMP,
        NumberOfFrames=2,
        PixelData=frames.tobytes(),
        PerFrameFunctionalGroupsSequence=Sequence([group, Dataset()]),
    )
    np.testing.assert_array_equal(read(file), spread(RAMP * 2.0 - 1000, -50.5, 49.5))


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_color_is_scaled_to_8_bits(dtype: type, top: int) -> None:
    frame = np.random.default_rng(0).integers(0, top + 1, (13, 21, 3)).astype(dtype)
    np.testing.assert_array_equal(read(written(frame)), np.round(frame * (255 / top)))


def test_a_model_gets_the_channels_that_it_takes() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (13, 21, 3), dtype=np.uint8)
    gray = np.asarray(Image.fromarray(rgb).convert("L"))
    np.testing.assert_array_equal(decode(written(rgb), channels=1, max_pixels=LIMIT)[..., 0], gray)
    own = read(written(RAMP))
    np.testing.assert_array_equal(decode(written(RAMP), channels=3, max_pixels=LIMIT), np.stack([own] * 3, axis=-1))
    assert (decode(written(RAMP), channels=4, max_pixels=LIMIT)[..., 3] == 255).all()


def test_the_limit_is_the_last_size_that_passes() -> None:
    assert read(written(RAMP), max_pixels=4096).shape == (64, 64)
    assert refusal(written(RAMP), max_pixels=4095) == "image file: 64 × 64 are 4,096 pixels, max_image_pixels is 4,095"


GRAY_FILE = written(RAMP)


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
def test_a_file_that_lies_is_refused(file: bytes, message: str) -> None:
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
def test_lies_take_no_memory_and_warn_nobody() -> None:
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


@pytest.fixture
def without_pydicom(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(module: str, *arguments: Any, **options: Any) -> Any:
        if module.partition(".")[0] == "pydicom":
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)


@pytest.mark.usefixtures("without_pydicom")
def test_without_the_extra_the_server_says_what_its_operator_can_install() -> None:
    with pytest.raises(FailedPrecondition, match=r"its operator can install sidelight\[dicom\]"):
        read(GRAY_FILE)


@pytest.mark.usefixtures("without_pydicom")
def test_without_the_extra_the_client_says_what_to_install() -> None:
    with pytest.raises(ValueError, match=r"pip install 'sidelight\[dicom\]"):
        _dicom.picture(GRAY_FILE)


def served(**fields: Any) -> Any:
    spec = sidelight_server.ModelSpec(small_cnn(1), input_size=(1, 32, 32), name="small", **fields)
    return sidelight_server.serve(spec)


def test_a_file_is_explained_as_its_pixels_are_and_drawn() -> None:
    file = (FOLDER / "test_files" / "CT_small.dcm").read_bytes()
    with served() as address, sidelight.connect(address) as client:
        answer = client.attribute([file])
        expected = client.attribute(read(file)[..., None])
        np.testing.assert_array_equal(answer.maps, expected.maps)
        assert answer.geometry == expected.geometry
        assert answer.picture(0).size == (32, 32)
        assert answer.overlay(0, original=True).size == (128, 128)


def test_a_window_of_the_model_is_reported_and_used() -> None:
    file = (FOLDER / "test_files" / "CT_small.dcm").read_bytes()
    with served(window=(-160, 240)) as address, sidelight.connect(address) as client:
        assert client.info().models[0].preprocessing.window == (-160, 240)
        answer = client.attribute([file])
        maps, shown = answer.maps, answer.picture(0).convert("L")
        expected = client.attribute(read(file, (-160, 240))[..., None]).picture(0).convert("L")
        np.testing.assert_allclose(np.asarray(shown).astype(int), expected, atol=1)
        np.testing.assert_array_equal(maps, client.attribute(read(file, (-160, 240))[..., None]).maps)
        assert (maps != client.attribute(read(file)[..., None]).maps).any()


def test_without_the_extra_a_file_fails_its_own_example_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydicom.py").write_text("raise ImportError")  # found first by the processes that decode, too
    monkeypatch.syspath_prepend(tmp_path)
    png = io.BytesIO()
    Image.new("L", (40, 50)).save(png, "PNG")
    with served() as address, sidelight.connect(address) as client:
        answer = client.attribute([png.getvalue(), GRAY_FILE], on_error="return")
    assert [(each.example, each.code) for each in answer.failures] == [(1, FailedPrecondition.code)]
    assert np.isfinite(answer.maps[0]).all()


@pytest.mark.parametrize("path", READ, ids=name)
def test_the_client_draws_what_the_server_reads(path: Path) -> None:
    file = path.read_bytes()
    picture = np.asarray(_dicom.picture(file)).astype(float)
    pixels = read(file)
    seen = np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels
    assert picture.shape == seen.shape
    if np.ptp(seen) > 0:
        assert np.corrcoef(picture.ravel(), seen.ravel())[0, 1] > 0.99  # both ways round would be −1


def test_what_pydicom_cannot_read_is_no_picture_for_the_client() -> None:
    with pytest.raises(ValueError, match="images: pydicom cannot read the DICOM file"):
        _dicom.picture(bytes(128) + b"DICM")
