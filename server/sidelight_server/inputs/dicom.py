"""Decodes the first frame of a DICOM file to displayable pixels. Needs pydicom, from the extra `sidelight[dicom]`.

Files are not trusted: sizes are checked before pixels are decoded, and any problem with the file raises
`InvalidArgument`.
"""

import io
import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import FailedPrecondition, InvalidArgument
from .pixels import Pixels, check_pixel_count, windowed

if TYPE_CHECKING:
    from pydicom import Dataset

# For the whole process, as for Pillow in `decoding`: the warnings quote the file.
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

Values = npt.NDArray[Any]

TABLE_ENTRIES = 1 << 16  # 16-bit gray values are mapped by a table, so that no frame is converted to float64
STRIP_PIXELS = 1 << 20
RLE_SLACK = 1 << 10  # bytes of padding that a segment may have

_DEFLATED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.8.1")
_RLE = "1.2.840.10008.1.2.5"
_TAGS = [
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth",
    "RedPaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableData",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths", "PixelData", "FloatPixelData", "DoubleFloatPixelData",
]  # fmt: skip
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def is_dicom(file: bytes) -> bool:
    """Return whether a file has the DICOM prefix."""
    return file[128:132] == b"DICM"


def read(file: bytes, *, max_pixels: int, window: tuple[float, float] | None = None) -> Pixels:
    """Return a file's first frame as displayed: gray `[H, W]` or RGB `[H, W, 3]`, uint8.

    Gray values go through the file's modality LUT or rescale slope, and then through `window`, in those units. Without
    `window` the file's first VOI LUT or window applies, or else the frame's range of values. MONOCHROME1 is inverted.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise FailedPrecondition(
            "image file: DICOM, which this server does not read; its operator can install sidelight[dicom]"
        ) from None
    try:
        with np.errstate(all="ignore"):
            return _read(file, max_pixels, window)
    except (InvalidArgument, MemoryError):
        raise
    except Exception as error:  # pydicom may raise anything
        raise InvalidArgument(f"image file: broken or truncated DICOM after {len(file):,} bytes") from error


def _read(file: bytes, max_pixels: int, window: tuple[float, float] | None) -> Pixels:
    dataset = _parse(file)
    check_pixel_count(int(dataset.Rows), int(dataset.Columns), max_pixels)
    frame = _frame(dataset)
    photometric = dataset.PhotometricInterpretation
    if photometric in ("MONOCHROME1", "MONOCHROME2") and frame.ndim == 2:
        _unpack_groups(dataset)
        gray = _look_up(frame, lambda values, is_there: _gray(values, is_there, dataset, window))
        return 255 - gray if photometric == "MONOCHROME1" else gray
    if photometric == "PALETTE COLOR" and frame.ndim == 2:
        from pydicom.pixels.processing import apply_color_lut

        colors = apply_color_lut(frame, dataset)[..., :3]
        return windowed(colors, 0, np.iinfo(colors.dtype).max)
    if photometric in _COLORS and frame.ndim == 3 and frame.dtype.kind == "u":
        return frame if frame.dtype == np.uint8 else windowed(frame, 0, 2 ** int(dataset.BitsStored) - 1)
    raise InvalidArgument(f"image file: DICOM of {photometric} {frame.dtype} {list(frame.shape)}, expected gray or RGB")


def _parse(file: bytes) -> "Dataset":
    import pydicom
    from pydicom.filereader import read_dataset

    # Read only the header first: a deflated data set would be inflated before it could be checked.
    stream = io.BytesIO(file)
    stream.seek(132)
    header = read_dataset(stream, False, True, stop_when=lambda tag, _vr, _length: tag.group != 2)
    if header.get("TransferSyntaxUID") in _DEFLATED:
        syntax = _name(header.TransferSyntaxUID)
        raise InvalidArgument(f"image file: DICOM in {syntax}, which is not supported; inflate it")
    stream.seek(0)
    dataset = pydicom.dcmread(stream, specific_tags=_TAGS)
    if not any(each in dataset for each in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise InvalidArgument("image file: DICOM without a picture")
    return dataset


def _frame(dataset: "Dataset") -> Values:
    """Return the first frame: [H, W], or RGB [H, W, 3] for color."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import pixel_array

    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decoder = None
    if decoder is None or not decoder.is_available:
        raise InvalidArgument(f"image file: DICOM in {_name(syntax)}, which this server has no codec for")
    if syntax.is_encapsulated:
        _check_frame(dataset)
    try:
        return pixel_array(dataset, index=0)
    except RuntimeError as error:
        raise InvalidArgument(
            f"image file: DICOM in {_name(syntax)}, broken or of a kind that this server has no codec for"
        ) from error


def _check_frame(dataset: "Dataset") -> None:
    """Raise `InvalidArgument` if a compressed frame's size differs from the file's: codecs use the frame's."""
    from pydicom.encaps import get_frame

    offsets = None
    if "ExtendedOffsetTable" in dataset:
        offsets = dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths
    n_frames = int(dataset.get("NumberOfFrames") or 1)
    frame = get_frame(dataset.PixelData, 0, extended_offsets=offsets, number_of_frames=n_frames)
    size = int(dataset.Rows), int(dataset.Columns)
    if dataset.file_meta.TransferSyntaxUID == _RLE:
        _check_rle(frame, size[0] * size[1])
    elif (found := _coded_size(frame)) != size:
        actual = " × ".join(f"{each:,}" for each in found) if found else "an unknown number"
        raise InvalidArgument(f"image file: DICOM of {size[0]:,} × {size[1]:,} pixels, its frame has {actual}")


def _check_rle(frame: bytes, n_pixels: int) -> None:
    count, *starts = struct.unpack("<16L", frame[:64])
    ends = [*starts[1:count], len(frame)]
    for start, end in zip(starts[:count], ends, strict=True):
        segment, at, n_bytes = frame[start:end], 0, 0
        while at < len(segment) and n_bytes <= n_pixels + RLE_SLACK:
            head = segment[at]
            n_bytes += head + 1 if head < 128 else 257 - head if head > 128 else 0
            at += head + 2 if head < 128 else 2 if head > 128 else 1
        if n_bytes > n_pixels + RLE_SLACK:
            raise InvalidArgument(f"image file: a DICOM frame of {n_pixels:,} pixels unpacks into more")


def _coded_size(frame: bytes) -> tuple[int, int] | None:
    """Return height and width from the header of a JPEG, JPEG-LS or JPEG 2000 frame; None if not found."""
    if frame.startswith(b"\xff\x4f\xff\x51"):
        width, height, left, top = struct.unpack(">4L", frame[8:24])
        return height - top, width - left
    at = 2 if frame.startswith(b"\xff\xd8") else len(frame)
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        mark = frame[at + 1]
        if mark == 0xFF:
            at += 1
        elif mark == 0xF7 or (0xC0 <= mark <= 0xCF and mark not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack(">HH", frame[at + 5 : at + 9])
            return height, width
        else:
            at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None


def _unpack_groups(dataset: "Dataset") -> None:
    """Copy the first frame's slope and window from the functional groups of multi-frame files to the top level."""
    for group in (each for name in _GROUPS for each in (dataset.get(name) or ())[:1]):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in (group.get(name) or ())[:1]:
                dataset.update(item)


def _look_up(frame: Values, make: Callable[[Values, Values], Pixels]) -> Pixels:
    """Apply `make` to a frame's values, through a lookup table if their range is small enough.

    `make` gets values, and a bool array of which of them occur in the frame.
    """
    if frame.dtype.kind in "iu":
        low, high = int(frame.min()), int(frame.max())
        if high - low < TABLE_ENTRIES:
            is_there = np.zeros(high - low + 1, bool)
            for rows in _strips(frame):
                is_there[_indices(frame[rows], low)] = True
            table = make(np.arange(low, high + 1), is_there)
            pixels = np.empty(frame.shape, np.uint8)
            for rows in _strips(frame):
                pixels[rows] = table[_indices(frame[rows], low)]
            return pixels
    return make(frame, np.ones(frame.shape, bool))


def _strips(frame: Values) -> Iterator[slice]:
    """Yield row slices of a frame, to bound the memory of table indices, which take eight bytes per pixel."""
    n_rows = max(1, STRIP_PIXELS // max(1, frame.shape[1]))
    return (slice(top, top + n_rows) for top in range(0, len(frame), n_rows))


def _indices(values: Values, low: int) -> Values:
    # Wraps around like fixed-size integers, so that signed types give the right difference.
    indices: Values = (values - values.dtype.type(low)).astype(f"u{values.itemsize}").astype(np.uint16)
    return indices


def _gray(values: Values, is_there: Values, dataset: "Dataset", window: tuple[float, float] | None) -> Pixels:
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    values = apply_modality_lut(values, dataset)
    if not np.isfinite(values).all():
        raise InvalidArgument("image file: DICOM with values that are not finite")
    if window is not None:
        return windowed(values, *window)
    tables = dataset.get("VOILUTSequence")
    if tables and None not in (tables[0].get("LUTDescriptor"), tables[0].get("LUTData")):
        return windowed(apply_voi(np.rint(values).astype(np.int64), dataset), 0, 2 ** tables[0].LUTDescriptor[2] - 1)
    own = _own_window(dataset)
    if own is None:
        low, high = float(values[is_there].min()), float(values[is_there].max())
        return windowed(values, low, high) if low < high else np.zeros(values.shape, np.uint8)
    center, width, function = own
    if function == "SIGMOID":
        return windowed(1 / (1 + np.exp(-4 * np.clip((values - center) / width, -50, 50))), 0, 1)
    if width == 0:
        return np.where(values > center, np.uint8(255), np.uint8(0))
    return windowed(values, center - width / 2, center + width / 2)


def _own_window(dataset: "Dataset") -> tuple[float, float, str] | None:
    """Return the file's first window: center, width, function; None if it has no usable one.

    For LINEAR, the default function, the width is reduced by 1 and the center by 0.5 (PS3.3 C.11.2.1.2.1).
    """
    from pydicom.multival import MultiValue

    center, width = (
        each[0] if isinstance(each, MultiValue) and each else each
        for each in (dataset.get("WindowCenter"), dataset.get("WindowWidth"))
    )
    function = str(dataset.get("VOILUTFunction") or "LINEAR").upper()
    if center in (None, "") or width in (None, "") or not np.isfinite([float(center), float(width)]).all():
        return None
    if function == "LINEAR":
        return (float(center) - 0.5, float(width) - 1, function) if width >= 1 else None
    return (float(center), float(width), function) if width > 0 else None


def _name(syntax: str) -> str:
    from pydicom.uid import UID

    return str(UID(syntax).name)
