"""Images: converts files and arrays to messages, and keeps them for overlays.

Files and encoded bytes are sent unchanged. uint8 arrays are pixels, [H, W, C] or [N, H, W, C]; floating arrays are the
model's own input, [C, H, W] or [N, C, H, W]. A torch tensor counts as an array; torch is never imported.
"""

import io
import os
import weakref
from collections.abc import Callable, Sequence

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..exceptions import InvalidArgument, UnreadableFile
from ..visualization import dicom
from ..visualization.overlay import gray_of, over_white, picture_of
from .batch import Batch, Images, Picture, batch_id
from .digests import digest_of_array, digest_of_file
from .targets import check_one_for_each, choice_message, target_message, target_of_part
from .tensors import DTYPES, Array, TorchTensor, host_array, little_endian, tensor_message

# Equivalents of modes that no file format has, and of YCbCr, whose TIFF files Pillow 12 and older cannot read.
_CONVERTED = {"YCbCr": "RGB", "HSV": "RGB", "I;16L": "I", "La": "LA", "PA": "RGBA", "RGBa": "RGBA", "RGBX": "RGB"}
_FRAME_BYTES = 8  # upper bound of the tag and length of a nested message
_KINDS = "a path, encoded bytes, a PIL image, an array, a tensor, or a list of them"


class EncodedBatch:
    """N examples ready to be sent, with the batch's own options, and a picture of each for overlays.

    Raises `InvalidArgument` for images that cannot be sent, and `UnreadableFile` for a file that cannot be read.
    """

    def __init__(self, given: "Images | Batch") -> None:
        batch = given if isinstance(given, Batch) else Batch(given)
        images = _as_list(batch.images)
        self.names: tuple[str | None, ...]  # the path of each example that came from a file
        # A copy: the caller may reuse the array for the next batch before this one is drawn.
        self._examples: Array | tuple[bytes, ...] = (
            tuple(map(_file, images)) if isinstance(images, list) else np.array(images, order="C")
        )
        self._served = () if batch.served_classes is None else _choices(batch.served_classes, len(self))
        self.names = tuple(map(_name, images)) if isinstance(images, list) else (None,) * len(self)
        self.id = None if batch.id is None else batch_id(batch.id)
        self.target = None if batch.target is None else target_message(batch.target)  # None: the target of the call
        if self.target is not None:
            check_one_for_each(self.target, len(self))

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def array(self) -> Array | None:
        """The examples as a contiguous array [N, …]; None if they are files."""
        return self._examples if isinstance(self._examples, np.ndarray) else None

    @property
    def message(self) -> tensor_pb2.Images:
        if isinstance(self._examples, np.ndarray):
            return tensor_pb2.Images(tensor=tensor_message(self._examples))
        return tensor_pb2.Images(encoded=tensor_pb2.EncodedImages(files=self._examples))

    def set_options(self, request: pb.AttributeRequest) -> None:
        """Set the batch's own target and served classes in its request, if it has them."""
        if self.target is not None:
            request.target.CopyFrom(self.target)
        if self._served:
            request.served_classes.classes.extend(self._served)

    def part(self, span: range) -> "EncodedBatch":
        """Return a range of examples as another batch, without a copy."""
        if len(span) == len(self):
            return self
        part = object.__new__(EncodedBatch)
        part.id, part.target = self.id, None if self.target is None else target_of_part(self.target, span)
        part._examples = self._examples[span.start : span.stop]
        part._served = self._served[span.start : span.stop]
        part.names = self.names[span.start : span.stop]
        return part

    def digests(self) -> tuple[str, ...]:
        """Return the SHA-256 of each example, as in `Provenance.example_digests`."""
        if isinstance(self._examples, np.ndarray):
            return tuple(map(digest_of_array, self._examples))
        return tuple(map(digest_of_file, self._examples))

    def sizes(self) -> list[int]:
        """Return the bytes that each example adds to a message, without the message's own overhead."""
        if isinstance(self._examples, np.ndarray):
            sizes = [self._examples[:1].nbytes] * len(self)
        else:
            sizes = [len(file) for file in self._examples]
        if self._served:
            sizes = [size + _FRAME_BYTES + each.ByteSize() for size, each in zip(sizes, self._served, strict=True)]
        return sizes

    def map_elements(self, input_size: tuple[int, int, int] | None, *, keeps_channels: bool) -> int:
        """Return the total elements of the maps for a model input of C, H, W; 0 if the size is unknown."""
        array = self.array
        if array is not None and array.dtype != np.uint8:
            channels, height, width = array.shape[1:]
        elif input_size is not None:
            channels, height, width = input_size
        else:
            return 0
        return int(len(self) * height * width * (channels if keeps_channels else 1))

    def picture(self, example: int, *, window: tuple[float, float] | None = None) -> Image.Image:
        """Return one example as an RGB picture: rotated by EXIF, transparency over white, floats scaled to 0…255.

        `window` has the values drawn black and white, for 16-bit and DICOM files; None is the file's own window.
        `InvalidArgument` for a DICOM file if pydicom is not installed.
        """
        given = self._examples[example]
        if isinstance(given, np.ndarray):
            return picture_of(given)
        if dicom.is_dicom(given):
            return dicom.picture(given, window)
        return _upright(Image.open(io.BytesIO(given)), window or (0, 0xFFFF))

    def dicom_file(self, example: int) -> bytes | None:
        """Return one example as the DICOM file that was given; None if it was something else."""
        given = self._examples[example]
        return given if isinstance(given, bytes) and dicom.is_dicom(given) else None


class WeakBatch:
    """A weak reference to a batch: an answer can draw its overlays only while the batch is alive elsewhere."""

    def __init__(self, batch: EncodedBatch | None) -> None:
        self._find: Callable[[], EncodedBatch | None] = (lambda: None) if batch is None else weakref.ref(batch)

    @property
    def batch(self) -> EncodedBatch | None:
        """The batch, or None once it was released."""
        return self._find()

    def __reduce__(self) -> "tuple[type[WeakBatch], tuple[None]]":
        return WeakBatch, (None,)


def _choices(classes: object, n_examples: int) -> tuple[pb.ClassChoice, ...]:
    if to_list := getattr(classes, "tolist", None):  # an array or a tensor
        classes = to_list()
    if isinstance(classes, str) or not isinstance(classes, Sequence) or len(classes) != n_examples:
        count = f"{len(classes)} classes" if isinstance(classes, list | tuple) else type(classes).__name__
        raise InvalidArgument(
            f"served_classes: got {count} for {n_examples} examples, expected a list with one for each"
        )
    return tuple(choice_message(each, "served_classes", context=" in the list") for each in classes)


def _as_list(images: Images) -> list[Picture | Array] | Array:
    """Return one array [N, …] if all images are arrays of equal shape and type, else a list to encode as files."""
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return [images]  # type: ignore[list-item]  # other buffers than bytes are converted when the file is read
    if isinstance(images, np.ndarray | TorchTensor):
        return _batched(_array(images))
    if not isinstance(images, Sequence):
        raise InvalidArgument(f"images: got {type(images).__name__}, expected {_KINDS}")
    each = [_array(image) if isinstance(image, np.ndarray | TorchTensor) else image for image in images]
    arrays = [image for image in each if isinstance(image, np.ndarray)]
    if not each or len(arrays) < len(each):
        return each  # type: ignore[return-value]  # tensors were converted to arrays above
    if len({(array.shape, array.dtype) for array in arrays}) == 1:
        return _batched(np.stack(arrays))
    if any(array.dtype != np.uint8 for array in arrays):
        shapes = sorted({f"{array.dtype} {list(array.shape)}" for array in arrays})
        raise InvalidArgument(
            f"images: floating arrays of a batch must be of one shape and type, got {', '.join(shapes[:4])}"
        )
    return list(arrays)


def _array(images: "Array | TorchTensor") -> Array:
    array = images if isinstance(images, np.ndarray) else host_array(images, "images")
    if array.dtype.name not in DTYPES:
        raise InvalidArgument(
            f"images: got {array.dtype} of {list(array.shape)}, expected uint8 pixels [H, W, C], or model-ready "
            f"float16, float32 or float64 [C, H, W]"
        )
    return little_endian(array)


def _batched(array: Array) -> Array:
    if array.ndim not in (3, 4):
        letters = "[H, W, C] or [N, H, W, C]" if array.dtype == np.uint8 else "[C, H, W] or [N, C, H, W]"
        raise InvalidArgument(f"images: got {array.dtype} of {list(array.shape)}, expected {letters}")
    return array if array.ndim == 4 else array[None]


def _name(image: object) -> str | None:
    """Return the path of an example as given; None if it is not a path."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else None


def _file(image: object) -> bytes:
    match image:
        case bytes():
            return image
        case bytearray() | memoryview():
            return bytes(image)
        case str() | os.PathLike():
            try:
                with open(image, "rb") as file:
                    return file.read()
            except OSError as error:
                raise UnreadableFile.of(error, "images", image) from None
            except ValueError as error:  # a path with a null byte
                raise InvalidArgument(f"images: got {image!r}, expected a path: {error}") from None
        case Image.Image():
            return _encoded(image)
        case np.ndarray() if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3, 4) and image.size:
            return _encoded(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image))
        case np.ndarray():
            raise InvalidArgument(
                f"images: got {image.dtype} of {list(image.shape)} among files or arrays of other sizes, "
                "expected uint8 [H, W, C] with 1, 3 or 4 channels"
            )
        case _:
            raise InvalidArgument(f"images: got {type(image).__name__} in the list, expected {_KINDS}")


def _encoded(image: Image.Image) -> bytes:
    """Encode a PIL image without loss: as PNG, or as TIFF for modes that PNG does not have.

    Of its EXIF data only the orientation is kept, for privacy: EXIF can hold the location of a photograph.
    """
    if not all(image.size):
        raise InvalidArgument(f"images: got a PIL image of mode {image.mode}, {image.size}: it is empty")
    file, exif = io.BytesIO(), Image.Exif()
    try:
        exif[ExifTags.Base.Orientation] = image.getexif().get(ExifTags.Base.Orientation, 1)
        if image.mode in _CONVERTED:
            image = image.convert(_CONVERTED[image.mode])
        if image.mode in ("CMYK", "LAB", "I", "F"):
            image.save(file, "TIFF", compression="raw", exif=exif)
        else:
            image.save(file, "PNG", compress_level=1, exif=exif)
    except Exception as error:  # Pillow documents no set of exceptions
        raise InvalidArgument(f"images: got a PIL image of mode {image.mode}, {image.size}: {error}") from error
    return file.getvalue()


def _upright(image: Image.Image, window: tuple[float, float]) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Pillow's own conversion to 8 bits clips instead of scaling.
        return Image.fromarray(gray_of(np.asarray(upright), *window)).convert("RGB")
    return over_white(upright)
