"""DICOM files as pictures for overlays, read with pydicom from the extra `sidelight[dicom]`.

A request needs neither: the server decodes the files.
"""

import io

import numpy as np
from PIL import Image

from ..exceptions import InvalidArgument
from .overlay import gray_of


def is_dicom(file: bytes) -> bool:
    """Return whether a file has the DICOM signature."""
    return file[128:132] == b"DICM"


def picture(file: bytes, window: tuple[float, float] | None = None) -> Image.Image:
    """Return a file's first frame as an RGB picture, with `window`, or the file's own window if None.

    `InvalidArgument` if pydicom is not installed, or cannot read the file.
    """
    try:
        import pydicom
        from pydicom.pixels import processing
        from pydicom.pixels.utils import pixel_array
    except ImportError:
        raise InvalidArgument("images: drawing a DICOM file needs pydicom: pip install 'sidelight[dicom]'") from None
    try:
        dataset = pydicom.dcmread(io.BytesIO(file))
        frame = pixel_array(dataset, index=0)
        photometric = dataset.PhotometricInterpretation
        if photometric == "PALETTE COLOR":
            frame = processing.apply_color_lut(frame, dataset)[..., :3]
        elif frame.ndim == 2:
            frame = processing.apply_modality_lut(frame, dataset)
            frame = processing.apply_voi_lut(frame, dataset) if window is None else gray_of(frame, *window)
    except Exception as error:  # pydicom documents no set of exceptions
        raise InvalidArgument(f"images: pydicom cannot read the DICOM file: {error}") from error
    if frame.dtype != np.uint8 or (frame.ndim == 2 and window is None):
        low, high = float(frame.min()), float(frame.max())
        frame = gray_of(frame, low, high if high > low else low + 1)
    return Image.fromarray(255 - frame if photometric == "MONOCHROME1" else frame).convert("RGB")
