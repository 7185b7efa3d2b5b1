"""Small image files of every mode and format, and the pixels that the server decodes from them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sidelight_server.errors import InvalidArgument
from sidelight_server.inputs.decoding import decode

HEIGHT, WIDTH = 13, 21  # odd and unlike, so that no turn or padding goes unseen


def to_file(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def to_pixels(file: bytes, channels: int = 3, max_pixels: int = 1_000_000) -> np.ndarray:
    return decode(file, channels=channels, max_pixels=max_pixels)


def noise(channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, channels), dtype=np.uint8)


def picture(mode: str) -> Image.Image:
    n_bands = len(Image.new(mode, (1, 1)).getbands())
    bands = [Image.fromarray(noise(1, seed=band)[..., 0]) for band in range(n_bands)]
    return bands[0] if mode == "L" else Image.merge(mode, bands)


LOSSLESS = {
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tiff": ("TIFF", {}),
    "tiff-lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "tiff-deflate": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "tiff-big": ("TIFF", {"big_tiff": True}),
}
LOSSY = {
    "jpeg": ("JPEG", {}),
    "jpeg-progressive": ("JPEG", {"progressive": True}),
    "webp-lossy": ("WEBP", {"quality": 50}),
    "gif": ("GIF", {}),
    "tiff-jpeg": ("TIFF", {"compression": "jpeg"}),
}
EVERY = LOSSLESS | LOSSY


def each(formats: dict[str, tuple[str, dict]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("kind", "options"), formats.values(), ids=formats.keys())


PALETTE = np.random.default_rng(7).integers(0, 256, (256, 3), dtype=np.uint8)


def palette_picture() -> tuple[Image.Image, np.ndarray]:
    indices = noise(1)[..., 0]
    image = Image.frombytes("P", (WIDTH, HEIGHT), indices.tobytes())
    image.putpalette(PALETTE.tobytes())
    return image, indices


def tiff_file(tags: dict[int, int | tuple[int, ...]], data: bytes, *, data_tag: int = 273) -> bytes:
    tags = tags | {data_tag: 0, data_tag + (6 if data_tag == 273 else 1): len(data)}
    at = 8 + 2 + 12 * len(tags) + 4  # the offset of what does not fit into an entry
    entries, beyond = b"", b""
    for tag in sorted(tags):
        value = tags[tag]
        if isinstance(value, tuple):
            entries += struct.pack("<HHII", tag, 3, len(value), at + len(beyond))
            beyond += struct.pack(f"<{len(value)}H", *value)
        else:
            entries += struct.pack("<HHI", tag, 4, 1) + (b"DATA" if tag == data_tag else struct.pack("<I", value))
    entries = entries.replace(b"DATA", struct.pack("<I", at + len(beyond)))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + beyond + data


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def refusal(file: bytes, max_pixels: int = 1_000_000) -> str:
    with pytest.raises(InvalidArgument) as caught:
        to_pixels(file, max_pixels=max_pixels)
    return caught.value.message


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
