"""Decoding: a file, PNG, JPEG, another format or DICOM, becomes pixels."""

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
from .pixels import lay_over_white, windowed

# A choice for the whole process, made once, because `warnings.catch_warnings` is not thread-safe before Python 3.14.
# Pillow's warnings quote the file: each new text would be logged and kept for ever.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

Pixels = npt.NDArray[np.uint8]

STRIP_PIXELS = 1 << 20

_MODES: Mapping[int, str] = MappingProxyType({1: "L", 3: "RGB", 4: "RGBA"})


class _FirstFrame(GifImageFile):
    """A GIF of which only the first frame is wanted, so nothing is disposed of after it.

    Pillow fills the disposed area while opening, before its size can be checked: 30 bytes would take 4 GB.
    """

    @property
    def disposal_method(self) -> int:
        return 0

    @disposal_method.setter
    def disposal_method(self, method: int) -> None:
        pass


# The files' first bytes choose the one parser that sees them, so none of Pillow's other thirty is ever reached.
_FORMATS: tuple[tuple[str, Callable[[bytes], bool], type[ImageFile]], ...] = (
    ("PNG", lambda file: file.startswith(b"\x89PNG\r\n\x1a\n"), PngImageFile),
    ("JPEG", lambda file: file.startswith(b"\xff\xd8\xff"), JpegImageFile),
    ("WebP", lambda file: file.startswith(b"RIFF") and file[8:12] == b"WEBP", WebPImageFile),
    ("TIFF", lambda file: file.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")), TiffImageFile),
    ("BMP", lambda file: file.startswith(b"BM"), BmpImageFile),
    ("GIF", lambda file: file.startswith((b"GIF87a", b"GIF89a")), _FirstFrame),
)


def lift_pillows_limit() -> None:
    """Let `max_pixels` be the only limit of a picture's size, in a process that is the server's own.

    Pillow's own limit warns, or raises, at sizes of its choosing, in some formats before the size can be read here.
    """
    Image.MAX_IMAGE_PIXELS = None


def _leave(pixels: Pixels) -> Pixels:
    return pixels


_UPRIGHT: Mapping[int, Callable[[Pixels], Pixels]] = MappingProxyType(
    {
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
    """Return a file's first frame as a model with 1, 3 or 4 channels takes it: uint8 `[H, W, C]`, writable.

    Turned upright by its EXIF orientation; alpha laid over white, or kept for 4 channels; 16-bit grey scaled to 8, all
    of it or the values of `window`. Colour profiles are not applied. Raises InvalidArgument, and nothing else, for
    whatever is wrong with the file; FailedPrecondition where it is DICOM and the package that reads that is not there;
    MemoryError where there is not enough.
    """
    if channels not in _MODES:
        raise InvalidArgument(f"image file: files give 1, 3 or 4 channels, the model wants {channels}; send arrays")
    if dicom.is_dicom(file):
        return _to_pixels(Image.fromarray(dicom.read(file, max_pixels=max_pixels, window=window)), channels, None)
    name, plugin = _recognise(file)
    try:
        with plugin(io.BytesIO(file)) as image:
            _check_size(image, max_pixels)
            if isinstance(image, WebPImageFile):
                _check_webp(image, max_pixels)
            image.load()
            pixels = _to_pixels(image, channels, window)  # [H, W, C]
            upright = _UPRIGHT.get(_orientation(image), _leave)
    except InvalidArgument:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # in a caller's own process
        found = str(error).partition(", could")[0]
        raise InvalidArgument(
            f"image file: {found}, which is Pillow's own in this process (PIL.Image.MAX_IMAGE_PIXELS); "
            f"max_image_pixels is {max_pixels:,}"
        ) from error
    except MemoryError:
        raise
    # Pillow promises no set of exceptions: OSError, SyntaxError, struct.error, zlib.error, … are all seen.
    except Exception as error:
        if "out of memory" in str(error):
            raise MemoryError(str(error)) from error
        raise InvalidArgument(f"image file: {_describe(error)} {name} after {len(file):,} bytes") from error
    return np.ascontiguousarray(upright(pixels))


def _recognise(file: bytes) -> tuple[str, type[ImageFile]]:
    for name, begins, plugin in _FORMATS:
        if begins(file):
            return name, plugin
    raise InvalidArgument(f"image file: {len(file):,} bytes are no PNG, JPEG, WebP, TIFF, BMP, GIF or DICOM")


def _check_size(image: ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if isinstance(image, TiffImageFile) and TILEWIDTH in image.tag_v2:
        # A tile is unpacked whole, so a small picture in one huge tile is a bomb too.
        width = max(width, image.tag_v2[TILEWIDTH])
        height = max(height, image.tag_v2[TILELENGTH])
    if height * width > max_pixels:
        raise InvalidArgument(
            f"image file: {height:,} × {width:,} are {height * width:,} pixels, max_image_pixels is {max_pixels:,}"
        )


def _check_webp(image: ImageFile, max_pixels: int) -> None:
    limit = max_pixels * 3 // 4  # libwebp and Pillow take 16 bytes a pixel, and all others 12 at most
    if image.height * image.width > limit:
        raise InvalidArgument(
            f"image file: a WebP of {image.height:,} × {image.width:,} pixels, which takes more memory than other "
            f"formats, expected at most {limit:,} (three quarters of max_image_pixels); send it as JPEG or PNG"
        )


def _orientation(image: ImageFile) -> int:
    if "exif" in image.info:
        # Read anew so that malformed EXIF raises: a JPEG's is read while opening, where Pillow passes over errors.
        Image.Exif().load(image.info["exif"])
    orientation: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation


def _to_pixels(image: Image.Image, channels: int, window: tuple[float, float] | None) -> Pixels:
    if image.mode == "F":
        raise InvalidArgument("image file: float pixels have no range that 8 bits could stand for; send a float array")
    if image.mode.startswith("I") and window is None:
        _check_16_bits(image)
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    for top, strip in _strips(image):
        pixels[top : top + strip.height] = _of_strip(strip, channels, window)
    return pixels


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield a picture in parts, each with its first row: what is made of them on the way takes many bytes a pixel."""
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
    grey = Image.fromarray(pixels)
    if "transparency" not in image.info:
        return grey
    opaque = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, opaque))


def _describe(error: Exception) -> str:
    return "truncated" if isinstance(error, EOFError) or "truncated" in str(error) else "broken or truncated"
