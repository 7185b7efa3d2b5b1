"""DICOM files: those of pydicom, and those that tests write."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from sidelight_server.errors import InvalidArgument
from sidelight_server.inputs import dicom

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


def is_read(file: bytes) -> bool:
    try:
        read(file)
    except InvalidArgument:
        return False
    return True


READ = [path for path in FILES if is_read(path.read_bytes())]
