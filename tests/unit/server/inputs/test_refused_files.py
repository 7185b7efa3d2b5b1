"""Files that are no pictures, are damaged, or would take too much memory are refused with InvalidArgument."""

import re
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sidelight_server.errors import InvalidArgument
from sidelight_server.inputs.decoding import lift_pillows_limit

from support.pictures.files import (
    EVERY,
    HEIGHT,
    WIDTH,
    each,
    exif,
    noise,
    palette_picture,
    picture,
    png_chunk,
    refusal,
    tiff_file,
    to_file,
    to_pixels,
)
from support.profiles import n_examples
from support.servers.processes import counts_memory, refused_apart


def test_a_file_that_is_no_picture_is_refused() -> None:
    assert refusal(b"seventeen letters") == "image file: 17 bytes are not a PNG, JPEG, WebP, TIFF, BMP, GIF or DICOM"
    assert refusal(b"") == "image file: 0 bytes are not a PNG, JPEG, WebP, TIFF, BMP, GIF or DICOM"


@pytest.mark.parametrize("kind", ["PPM", "EPS", "PDF", "TGA", "ICO", "JPEG2000", "PCX", "SGI"])
def test_a_format_off_the_list_is_refused_unread(kind: str) -> None:
    assert "are not a PNG, JPEG, WebP" in refusal(to_file(Image.fromarray(noise(3)), kind))


@each(EVERY)
def test_a_file_cut_anywhere_is_refused_or_whole(kind: str, options: dict) -> None:
    file = to_file(Image.fromarray(noise(3)), kind, **options)
    whole = to_pixels(file)
    for length in [*range(0, len(file), 7), *range(len(file) - 20, len(file))]:
        try:
            decoded = to_pixels(file[:length])
        except InvalidArgument as error:
            assert re.fullmatch(r"image file: [\w ,]+", error.message)  # noqa: PT017
        else:
            np.testing.assert_array_equal(decoded, whole)


def test_the_error_of_a_cut_file_has_its_length() -> None:
    file = to_file(Image.fromarray(noise(3)).resize((60, 60)), "PNG")
    assert refusal(file[:1204]) == "image file: truncated PNG after 1,204 bytes"


BEGINNINGS = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\1\0\0WEBP", b"II*\0", b"MM\0+", b"BM", b"GIF89a"]


@settings(max_examples=n_examples(400))
@given(st.sampled_from(BEGINNINGS), st.binary(max_size=300), st.sampled_from([1, 3, 4]))
@example(b"GIF89a", b"", 3)
def test_random_bytes_raise_nothing_but_invalid_argument(beginning: bytes, rest: bytes, channels: int) -> None:
    try:
        decoded = to_pixels(beginning + rest, channels, max_pixels=10_000)
    except InvalidArgument as error:
        assert error.message.startswith("image file: ")  # noqa: PT017
    else:
        assert decoded.shape[2] == channels


VALID = [
    to_file(picture(mode), kind, exif=exif(6), **options)
    for mode in ("RGB", "L")
    for kind, options in EVERY.values()
    if kind not in ("BMP", "GIF")
]
VALID += [to_file(Image.fromarray(noise(3)), "GIF"), to_file(Image.fromarray(noise(3)), "BMP")]
VALID += [to_file(picture("LA"), "PNG"), to_file(picture("RGBA"), "TIFF"), to_file(palette_picture()[0], "PNG")]


@settings(max_examples=n_examples(400))
@given(
    st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=4)), max_size=5)
)
def test_a_damaged_file_raises_nothing_but_invalid_argument(file: bytes, damages: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(file)
    for where, what in damages:
        at = where % len(file)
        damaged[at : at + len(what)] = what
    try:
        decoded = to_pixels(bytes(damaged), max_pixels=10_000)
    except InvalidArgument as error:
        assert error.message.startswith("image file: ")  # noqa: PT017
    else:
        assert decoded.shape[2] == 3


def png_bomb(height: int, width: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))


def gif_bomb(height: int, width: int, *, disposal: int, screen: tuple[int, int] = (1, 1)) -> bytes:
    head = b"GIF89a" + struct.pack("<HHBBB", screen[1], screen[0], 0x80, 0, 0) + b"\0\0\0\xff\0\0"
    control = b"\x21\xf9\x04" + bytes([disposal << 2 | 1, 0, 0, 0, 0])
    return head + control + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"


def webp_bomb(height: int, width: int) -> bytes:
    pixel = to_file(Image.new("RGB", (1, 1)), "WEBP", lossless=True)[12:]
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    frame = struct.pack("<I", 16 + len(pixel)) + bytes(16) + pixel
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + canvas + b"ANIM\6\0\0\0" + bytes(6) + b"ANMF" + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_bomb(height: int, width: int) -> bytes:
    file = to_file(Image.new("L", (8, 8)), "JPEG")
    at = file.index(b"\xff\xc0") + 5
    return file[:at] + struct.pack(">HH", height, width) + file[at + 4 :]


def bmp_bomb(height: int, width: int) -> bytes:
    file = to_file(Image.new("RGB", (8, 8)), "BMP")
    return file[:18] + struct.pack("<ii", width, height) + file[26:]


def tiff_bomb(height: int, width: int) -> bytes:
    return tiff_file({256: width, 257: height, 258: 8, 259: 8, 262: 1, 277: 1, 278: height}, zlib.compress(bytes(1000)))


def tiff_tile_bomb(height: int, width: int) -> bytes:
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: width, 323: height}
    return tiff_file(tags, zlib.compress(bytes(1 << 20)), data_tag=324)


BOMBS = {
    "png": png_bomb(60_000, 60_000),
    "gif": gif_bomb(60_000, 60_000, disposal=0, screen=(60_000, 60_000)),
    "gif-frame": gif_bomb(60_000, 60_000, disposal=0),
    "gif-disposed": gif_bomb(60_000, 60_000, disposal=2),
    "gif-restored": gif_bomb(60_000, 60_000, disposal=3),
    "webp": webp_bomb(60_000, 60_000),
    "jpeg": jpeg_bomb(60_000, 60_000),
    "bmp": bmp_bomb(60_000, 60_000),
    "tiff": tiff_bomb(60_000, 60_000),
    "tiff-tile": tiff_tile_bomb(60_000, 60_000),
}


@pytest.mark.parametrize("file", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_by_its_header(file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    lift_pillows_limit()  # as in the server's own process
    limit = 50_000_000
    message = "image file: 60,000 × 60,000 are 3,600,000,000 pixels, max_image_pixels is 50,000,000"
    assert refusal(file, max_pixels=limit) == message


@pytest.mark.parametrize("file", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_in_a_callers_own_process_too(file: bytes) -> None:
    """Where Pillow's limit is the caller's, and may come first."""
    message = refusal(file, max_pixels=50_000_000).replace(",", "")
    assert "3600000000 pixels" in message
    assert "max_image_pixels is 50000000" in message


def test_pillows_limit_is_left_alone_in_a_callers_own_process() -> None:
    code = """if True:
        from PIL import Image
        before = Image.MAX_IMAGE_PIXELS
        import io, torch, sidelight, sidelight_server
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        spec = sidelight_server.ModelSpec(module, input_size=(3, 8, 8))
        with sidelight_server.serve(spec, device="cpu") as address, sidelight.connect(address) as client:
            client.attribute([file.getvalue()])
        assert Image.MAX_IMAGE_PIXELS == before > 0
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@counts_memory
def test_bombs_take_no_memory() -> None:
    messages, grown_kib = refused_apart(BOMBS.values())
    assert len(messages) == len(BOMBS)
    # What any of them claims is 3.6 GB; the small change is Python's own.
    assert grown_kib < 50_000


def test_the_limit_is_the_last_size_that_passes() -> None:
    file = to_file(Image.fromarray(noise(3)), "PNG")
    assert to_pixels(file, max_pixels=HEIGHT * WIDTH).shape == (HEIGHT, WIDTH, 3)
    assert refusal(file, max_pixels=HEIGHT * WIDTH - 1) == (
        f"image file: {HEIGHT} × {WIDTH} are {HEIGHT * WIDTH} pixels, max_image_pixels is {HEIGHT * WIDTH - 1}"
    )


def test_a_webp_which_takes_more_memory_may_have_three_quarters_of_the_pixels() -> None:
    file = to_file(Image.fromarray(noise(3)), "WEBP")
    least = -(-HEIGHT * WIDTH * 4 // 3)
    assert to_pixels(file, max_pixels=least).shape == (HEIGHT, WIDTH, 3)
    assert f"expected at most {HEIGHT * WIDTH - 1:,} " in refusal(file, max_pixels=least - 1)


def test_an_operator_may_allow_more_than_pillow_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    lift_pillows_limit()
    # 100 and 200 million: where Pillow alone would warn, and where it would raise. The data is cut short on purpose.
    for side in (10_000, 14_200):
        assert refusal(png_bomb(side, side), max_pixels=10**9).startswith("image file: truncated PNG")


def test_threads_do_not_disturb_each_other() -> None:
    files = [to_file(Image.fromarray(noise(3, seed)), "PNG") for seed in range(8)]
    bomb = BOMBS["png"]

    def work(turn: int) -> bool:
        refusal(bomb)
        return np.array_equal(to_pixels(files[turn % 8]), noise(3, turn % 8))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(200)))
