"""Decoding of DICOM files, compared with pydicom's own steps."""

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import sidelight
import sidelight_server
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from sidelight.visualization import dicom as _dicom
from sidelight_server.errors import FailedPrecondition, InvalidArgument
from sidelight_server.inputs.decoding import decode

from support.models import small_cnn
from support.pictures.dicom_files import FOLDER, LIMIT, RAMP, READ, name, read, refusal, table, written

# Both sides let pydicom say what it likes; pytest would make errors of that.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


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
