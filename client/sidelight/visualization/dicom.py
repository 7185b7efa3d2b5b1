"""A DICOM file as a picture to lay an overlay on. The server reads such files by itself.

The reader is pydicom, which the extra `sidelight[dicom]` brings.
"""

import io

import numpy as np
from PIL import Image

from ..exceptions import InvalidArgument
from .overlay import grey_of


def is_dicom(file: bytes) -> bool:
    """Say whether a file begins as DICOM files do."""
    return file[128:132] == b"DICM"


def picture(file: bytes, window: tuple[float, float] | None = None) -> Image.Image:
    """Return a file's first frame as an RGB picture: by `window`, else by its own, stretched to be seen.

    `InvalidArgument` where pydicom is not installed, or cannot read it.
    """
    try:
        import pydicom
        from pydicom.pixels import processing
        from pydicom.pixels.utils import pixel_array
    except ImportError:
        raise InvalidArgument("images: DICOM, which is drawn with pydicom; install sidelight[dicom]") from None
    try:
        dataset = pydicom.dcmread(io.BytesIO(file))
        frame = pixel_array(dataset, index=0)
        photometric = dataset.PhotometricInterpretation
        if photometric == "PALETTE COLOR":
            frame = processing.apply_color_lut(frame, dataset)[..., :3]
        elif frame.ndim == 2:
            frame = processing.apply_modality_lut(frame, dataset)
            frame = processing.apply_voi_lut(frame, dataset) if window is None else grey_of(frame, *window)
    except Exception as error:  # pydicom promises no set of exceptions
        raise InvalidArgument(f"images: DICOM that pydicom does not read: {error}") from error
    if frame.dtype != np.uint8 or (frame.ndim == 2 and window is None):
        low, high = float(frame.min()), float(frame.max())
        frame = grey_of(frame, low, high if high > low else low + 1)
    return Image.fromarray(255 - frame if photometric == "MONOCHROME1" else frame).convert("RGB")
