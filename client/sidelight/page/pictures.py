"""`PictureStore`: the pictures that the page can explain, from the command line and from uploads."""

import hashlib
import io
import tempfile
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .._inputs.images import EncodedBatch
from ..exceptions import InvalidArgument, MessageTooLarge, NotFound, ResourceExhausted, UnreadableFile
from ..visualization.dicom import is_dicom
from ..visualization.overlay import encoded

MAX_FILE_BYTES = 64 * 1024 * 1024  # the default limit of a message to the server
MAX_UPLOAD_BYTES = 2 * 1024 * 1024 * 1024  # limit of all uploads together
MAX_UPLOADS = 5000
MAX_PIXELS = 50_000_000  # the server's default
THUMBNAIL_PX = 128
LOSSLESS_PIXELS = 2_000_000  # a larger picture is sent to the browser as JPEG: PNG takes seconds
JPEG_QUALITY = 95

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Picture:
    """A file that can be explained. The id is all that the browser can name."""

    id: str
    name: str
    path: Path

    def read(self) -> bytes:
        """Return the file's bytes. `UnreadableFile`, or `MessageTooLarge` above `MAX_FILE_BYTES`."""
        try:
            with self.path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise UnreadableFile.of(error, "picture", self.name) from None
        _check_size(len(content))
        return content

    def to_dict(self) -> dict[str, str]:
        """Return the values that the browser gets."""
        return {"id": self.id, "name": self.name}


class PictureStore:
    """The pictures by id. Uploads are files in a folder of their own, which `close` removes."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sidelight-page-")
        self._pictures: dict[str, Picture] = {}
        self._n_uploads = self._upload_bytes = 0
        for path in paths:
            id_ = _id(str(path.absolute()).encode())
            self._pictures[id_] = Picture(id_, path.name, path)

    def close(self) -> None:
        self._folder.cleanup()

    def all(self) -> list[Picture]:
        """Return the pictures in the order in which they were added."""
        return list(self._pictures.values())

    def find(self, id_: object) -> Picture:
        """Return a picture. `NotFound` if there is none of this id."""
        picture = self._pictures.get(id_) if isinstance(id_, str) else None
        if picture is None:
            raise NotFound("picture: the page no longer has this picture; add it again")
        return picture

    async def add(self, name: str, chunks: AsyncIterator[bytes]) -> Picture:
        """Store an upload, and return its picture; the same bytes give the same picture.

        `MessageTooLarge` above `MAX_FILE_BYTES`; `ResourceExhausted` if uploads take too much together.
        """
        content = bytearray()
        async for chunk in chunks:
            content += chunk
            _check_size(len(content))
        if not content:
            raise InvalidArgument(f"picture: {name} is empty")
        id_ = _id(content)
        if id_ in self._pictures:
            return self._pictures[id_]
        if self._n_uploads >= MAX_UPLOADS or self._upload_bytes + len(content) > MAX_UPLOAD_BYTES:
            raise ResourceExhausted(
                f"picture: uploads are at their limit of {MAX_UPLOADS} files and {MAX_UPLOAD_BYTES // _MIB} MiB; "
                "restart the page to delete them"
            )
        path = Path(self._folder.name) / id_
        path.write_bytes(content)
        self._n_uploads += 1
        self._upload_bytes += len(content)
        self._pictures[id_] = Picture(id_, Path(name).name[:200] or "picture", path)
        return self._pictures[id_]


def rendition(content: bytes, window: tuple[float, float] | None = None) -> tuple[bytes, str]:
    """Return a picture as browsers show it, at its own size, and its media type: PNG, or JPEG for large ones."""
    picture = _decoded(content, window)
    if picture.width * picture.height <= LOSSLESS_PIXELS:
        return encoded(picture, "PNG", compress_level=1), "image/png"
    return encoded(picture, "JPEG", quality=JPEG_QUALITY, subsampling=0), "image/jpeg"


def thumbnail(content: bytes) -> tuple[bytes, str]:
    """Return a picture's center square as a JPEG of `THUMBNAIL_PX`, and its media type."""
    picture = _decoded(content, None)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    size, box = (THUMBNAIL_PX, THUMBNAIL_PX), (left, top, left + side, top + side)
    square = picture.resize(size, Image.Resampling.BILINEAR, box, reducing_gap=2.0)
    return encoded(square, "JPEG", quality=80), "image/jpeg"


def shown_window(values: Sequence[str | None]) -> tuple[float, float] | None:
    """Return the black and white values of a query; None if they are missing or no numbers."""
    try:
        low, high = (float(each or "") for each in values)
    except ValueError:
        return None
    return (low, high) if low < high else None


def _decoded(content: bytes, window: tuple[float, float] | None) -> Image.Image:
    """Return an RGB picture. `InvalidArgument` if the file is none, or has more than `MAX_PIXELS`."""
    try:
        n_pixels = _pixel_count(content)
        if n_pixels <= MAX_PIXELS:
            return EncodedBatch(content).picture(0, window=window)
    except InvalidArgument:
        raise
    except Exception as error:  # Pillow and pydicom document no set of exceptions
        raise InvalidArgument(f"picture: cannot be shown: {error}") from None
    raise InvalidArgument(f"picture: {n_pixels / 1e6:.0f} megapixels, expected at most {MAX_PIXELS / 1e6:.0f}")


def _pixel_count(content: bytes) -> int:
    """Return height × width from the file's header, before anything is decoded."""
    if not is_dicom(content):
        with Image.open(io.BytesIO(content)) as picture:
            return picture.width * picture.height
    try:
        from pydicom import dcmread
    except ImportError:
        return 0  # decoding raises the error, which names what to install
    header = dcmread(io.BytesIO(content), stop_before_pixels=True, specific_tags=["Rows", "Columns"])
    return int(header.Rows) * int(header.Columns)


def _check_size(n_bytes: int) -> None:
    if n_bytes > MAX_FILE_BYTES:
        raise MessageTooLarge(f"picture: larger than {MAX_FILE_BYTES // _MIB} MiB, the limit of the page")


def _id(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
