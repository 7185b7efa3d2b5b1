"""Decodes image files (PNG, JPEG, WebP, TIFF, BMP, GIF, DICOM) to pixels."""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ..errors import InvalidArgument
from . import dicom
from .pixels import Pixels, TooManyPixels, check_pixel_count, lay_over_white, windowed

# Set once for the whole process, because `warnings.catch_warnings` is not thread-safe before Python 3.14. Pillow's
# warnings quote the file, so each new text would be logged and kept forever.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

STRIP_PIXELS = 1 << 20

_MODES: Mapping[int, str] = MappingProxyType({1: "L", 3: "RGB", 4: "RGBA"})


class _FirstFrame(GifImageFile):
    """A GIF of which only the first frame is read, so the disposal method is ignored.

    Pillow fills the disposed area while opening, before the size can be checked: 30 bytes could take 4 GB.
    """

    @property
    def disposal_method(self) -> int:
        return 0

    @disposal_method.setter
    def disposal_method(self, method: int) -> None:
        pass


# The first bytes of a file select the parser, so Pillow's other thirty parsers never see it.
_FORMATS: tuple[tuple[str, Callable[[bytes], bool], type[ImageFile]], ...] = (
    ("PNG", lambda file: file.startswith(b"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("JPEG", lambda file: file.startswith(b"\xff\xd8\xff"), JpegImageFile),
    ("WebP", lambda file: file.startswith(b"RIFF") and file[8:12] == b"WEBP", WebPImageFile),
    ("TIFF", lambda file: file.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")), TiffImageFile),
    ("BMP", lambda file: file.startswith(b"BM"), BmpImageFile),
    ("GIF", lambda file: file.startswith((b"GIF87a", b"GIF89a")), _FirstFrame),
)


def lift_pillows_limit() -> None:
    """Remove Pillow's size limit, so that `max_pixels` is the only one. For processes that belong to the server.

    Pillow warns or raises at its own limits, in some formats before the size can be read here.
    """
    Image.MAX_IMAGE_PIXELS = None


_UPRIGHT: Mapping[int, Callable[[Pixels], Pixels]] = MappingProxyType(
    {
        1: lambda pixels: pixels,
        2: lambda pixels: pixels[:, ::-1],
        3: lambda pixels: pixels[::-1, ::-1],
        4: lambda pixels: pixels[::-1],
        5: lambda pixels: pixels.swapaxes(0, 1),
        6: lambda pixels: pixels[::-1].swapaxes(0, 1),
        7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
        8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
    }
)


def decode(file: bytes, *, channels: int, max_pixels: int, window: tuple[float, float] | None = None) -> Pixels:
    """Decode a file's first frame for a model with 1, 3 or 4 channels: uint8 `[H, W, C]`, writable.

    EXIF orientation is applied; alpha is composited over white, or kept for 4 channels; 16-bit gray is scaled to 8
    bits, from its full range or from `window`. Color profiles are not applied. Raises `InvalidArgument` for any problem
    with the file, `FailedPrecondition` for DICOM if pydicom is not installed, and `MemoryError`.
    """
    if channels not in _MODES:
        raise InvalidArgument(f"image file: files give 1, 3 or 4 channels, the model takes {channels}; send arrays")
    if dicom.is_dicom(file):
        return _to_pixels(Image.fromarray(dicom.read(file, max_pixels=max_pixels, window=window)), channels, None)
    name, plugin = _recognize(file)
    try:
        with plugin(io.BytesIO(file)) as image:
            _check_size(image, max_pixels)
            if isinstance(image, WebPImageFile):
                _check_webp(image, max_pixels)
            image.load()
            pixels = _to_pixels(image, channels, window)  # [H, W, C]
            upright = _UPRIGHT.get(_orientation(image), _UPRIGHT[1])
    except (InvalidArgument, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # in a caller's process
        found = str(error).partition(", could")[0]
        raise InvalidArgument(
            f"image file: {found}, which is Pillow's own in this process (PIL.Image.MAX_IMAGE_PIXELS); "
            f"max_image_pixels is {max_pixels:,}"
        ) from error
    except Exception as error:  # Pillow raises many types: OSError, SyntaxError, struct.error, zlib.error and others
        if "out of memory" in str(error):
            raise MemoryError(str(error)) from error
        raise InvalidArgument(f"image file: {_describe(error)} {name} after {len(file):,} bytes") from error
    return np.ascontiguousarray(upright(pixels))


def _recognize(file: bytes) -> tuple[str, type[ImageFile]]:
    for name, begins, plugin in _FORMATS:
        if begins(file):
            return name, plugin
    raise InvalidArgument(f"image file: {len(file):,} bytes are not a PNG, JPEG, WebP, TIFF, BMP, GIF or DICOM")


def _check_size(image: ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if isinstance(image, TiffImageFile) and TILEWIDTH in image.tag_v2:
        # A tile is unpacked whole, so a small image in one huge tile is a decompression bomb too.
        width = max(width, image.tag_v2[TILEWIDTH])
        height = max(height, image.tag_v2[TILELENGTH])
    check_pixel_count(height, width, max_pixels)


def _check_webp(image: ImageFile, max_pixels: int) -> None:
    limit = max_pixels * 3 // 4  # libwebp and Pillow take 16 bytes per pixel, all other formats at most 12
    if image.height * image.width > limit:
        raise TooManyPixels(
            f"image file: a WebP of {image.height:,} × {image.width:,} pixels, which takes more memory than other "
            f"formats, expected at most {limit:,} (three quarters of max_image_pixels); send it as JPEG or PNG"
        )


def _orientation(image: ImageFile) -> int:
    if "exif" in image.info:
        # Parsed again so that malformed EXIF raises: Pillow ignores such errors when opening a JPEG.
        Image.Exif().load(image.info["exif"])
    orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation


def _to_pixels(image: Image.Image, channels: int, window: tuple[float, float] | None) -> Pixels:
    if image.mode == "F":
        raise InvalidArgument("image file: float pixels have no known range to convert to 8 bits; send a float array")
    if image.mode.startswith("I") and window is None:
        _check_16_bits(image)
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    for top, strip in _strips(image):
        pixels[top : top + strip.height] = _of_strip(strip, channels, window)
    return pixels


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in strips, each with its top row, to bound the memory of intermediate arrays."""
    n_rows = max(1, STRIP_PIXELS // image.width)
    if n_rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, n_rows):
        yield top, image.crop((0, top, image.width, min(top + n_rows, image.height)))


def _of_strip(image: Image.Image, channels: int, window: tuple[float, float] | None) -> Pixels:
    if image.mode.startswith("I"):
        image = _scale_to_8_bits(image, window)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.fromarray(lay_over_white(np.asarray(image)))
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    return np.asarray(image).reshape(image.height, image.width, channels)  # [H, W, C]


def _check_16_bits(image: Image.Image) -> None:
    ranges = [(int(values.min()), int(values.max())) for values in (np.asarray(strip) for _, strip in _strips(image))]
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low < 0 or high > 0xFFFF:
        raise InvalidArgument(
            f"image file: values from {low:,} to {high:,}, expected 8 or 16 unsigned bits; send arrays"
        )


def _scale_to_8_bits(image: Image.Image, window: tuple[float, float] | None) -> Image.Image:
    values = np.asarray(image).astype(np.int32)  # [H, W]
    if window is not None:
        return _with_transparency(image, values, windowed(values, *window))
    # 65535 = 257 · 255 and 257 is odd, so this is value · 255 / 65535 rounded, without a tie.
    return _with_transparency(image, values, ((values + 128) // 257).astype(np.uint8))


def _with_transparency(image: Image.Image, values: npt.NDArray[np.int32], pixels: Pixels) -> Image.Image:
    gray = Image.fromarray(pixels)
    if "transparency" not in image.info:
        return gray
    opaque = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("LA", (gray, opaque))


def _describe(error: Exception) -> str:
    return "truncated" if isinstance(error, EOFError) or "truncated" in str(error) else "broken or truncated"
