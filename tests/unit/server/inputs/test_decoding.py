"""Decoding of files: every mode and format compared with Pillow or a formula."""

import io
import re
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps
from sidelight_server.errors import InvalidArgument
from sidelight_server.inputs.decoding import decode

from support.pictures.files import (
    EVERY,
    HEIGHT,
    LOSSLESS,
    LOSSY,
    PALETTE,
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


def over_white(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(np.float64) / 255
    return np.floor(color * share + 255 * (1 - share) + 0.5).astype(np.uint8)


def gray_of(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).convert("L"))[..., None]


WITH_ALPHA = {name: LOSSLESS[name] for name in ("png", "webp", "tiff", "tiff-lzw")}


@each(LOSSLESS)
def test_a_lossless_file_gives_back_the_pixels_it_was_made_of(kind: str, options: dict) -> None:
    pixels = noise(3)
    decoded = to_pixels(to_file(Image.fromarray(pixels), kind, **options))
    np.testing.assert_array_equal(decoded, pixels)


@each(LOSSY)
def test_a_lossy_file_gives_what_pillow_gives(kind: str, options: dict) -> None:
    file = to_file(Image.fromarray(noise(3)), kind, **options)
    with Image.open(io.BytesIO(file)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(to_pixels(file), expected)


@each(EVERY)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_are_uint8_contiguous_and_free_to_be_written_to(kind: str, options: dict, channels: int) -> None:
    decoded = to_pixels(to_file(Image.fromarray(noise(3)), kind, **options), channels)
    assert decoded.shape == (HEIGHT, WIDTH, channels)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


def test_color_becomes_gray_and_gray_becomes_color() -> None:
    rgb, gray = noise(3), noise(1)
    np.testing.assert_array_equal(to_pixels(to_file(Image.fromarray(rgb), "PNG"), 1), gray_of(rgb))
    gray_file = to_file(Image.fromarray(gray[..., 0]), "PNG")
    np.testing.assert_array_equal(to_pixels(gray_file, 1), gray)
    np.testing.assert_array_equal(to_pixels(gray_file, 3), np.repeat(gray, 3, axis=-1))


def test_without_transparency_a_model_of_four_channels_gets_full_alpha() -> None:
    decoded = to_pixels(to_file(Image.fromarray(noise(3)), "PNG"), 4)
    np.testing.assert_array_equal(decoded, np.dstack([noise(3), np.full((HEIGHT, WIDTH), 255)]))


@each(WITH_ALPHA)
def test_alpha_is_laid_over_white_or_kept(kind: str, options: dict) -> None:
    rgba = noise(4)
    # WebP's encoder may clear colors that cannot be seen.
    rgba[rgba[..., 3] == 0] = 0
    file = to_file(Image.fromarray(rgba), kind, **options)
    white = over_white(rgba[..., :3], rgba[..., 3:])
    np.testing.assert_array_equal(to_pixels(file, 4), rgba)
    np.testing.assert_array_equal(to_pixels(file, 3), white)
    np.testing.assert_array_equal(to_pixels(file, 1), gray_of(white))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_with_alpha_is_laid_over_white_or_kept(kind: str) -> None:
    image = picture("LA")
    gray, alpha = (np.asarray(band)[..., None] for band in image.split())
    file = to_file(image, kind)
    white = over_white(gray, alpha)
    np.testing.assert_array_equal(to_pixels(file, 1), white)
    np.testing.assert_array_equal(to_pixels(file, 3), np.repeat(white, 3, axis=-1))
    np.testing.assert_array_equal(to_pixels(file, 4), np.concatenate([gray, gray, gray, alpha], axis=-1))


def test_over_white_is_exact_for_every_color_and_alpha() -> None:
    color, alpha = (plane.astype(np.uint8) for plane in np.mgrid[0:256, 0:256])
    file = to_file(Image.merge("LA", (Image.fromarray(color), Image.fromarray(alpha))), "PNG")
    np.testing.assert_array_equal(to_pixels(file, 1)[..., 0], over_white(color, alpha))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_a_palette_is_looked_up(kind: str) -> None:
    image, indices = palette_picture()
    file = to_file(image, kind)
    np.testing.assert_array_equal(to_pixels(file), PALETTE[indices])
    np.testing.assert_array_equal(to_pixels(file, 1), gray_of(PALETTE[indices]))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind: str) -> None:
    image, indices = palette_picture()
    hidden = int(indices[0, 0])
    file = to_file(image, kind, transparency=hidden)
    expected = PALETTE[indices]
    expected[indices == hidden] = 255
    np.testing.assert_array_equal(to_pixels(file), expected)
    np.testing.assert_array_equal(to_pixels(file, 4)[..., 3], np.where(indices == hidden, 0, 255))


def test_a_palette_of_many_alphas_is_laid_over_white() -> None:
    image, indices = palette_picture()
    alphas = np.arange(256, dtype=np.uint8)[::-1]
    file = to_file(image, "PNG", transparency=alphas.tobytes())
    np.testing.assert_array_equal(to_pixels(file), over_white(PALETTE[indices], alphas[indices][..., None]))
    np.testing.assert_array_equal(to_pixels(file, 4), np.dstack([PALETTE[indices], alphas[indices]]))


def test_a_transparent_color_of_an_rgb_file_is_white() -> None:
    rgb = noise(3)
    hidden = tuple(int(value) for value in rgb[3, 4])
    file = to_file(Image.fromarray(rgb), "PNG", transparency=hidden)
    matches = (rgb == rgb[3, 4]).all(-1)
    np.testing.assert_array_equal(to_pixels(file), np.where(matches[..., None], 255, rgb))
    np.testing.assert_array_equal(to_pixels(file, 4)[..., 3], np.where(matches, 0, 255))


def test_a_transparent_gray_is_white() -> None:
    gray = noise(1)
    file = to_file(Image.fromarray(gray[..., 0]), "PNG", transparency=int(gray[3, 4, 0]))
    np.testing.assert_array_equal(to_pixels(file, 1), np.where(gray == gray[3, 4, 0], 255, gray))


def test_a_transparent_16_bit_gray_is_white() -> None:
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)
    file = to_file(Image.fromarray(values), "PNG")
    at = file.index(b"IDAT") - 4
    file = file[:at] + png_chunk(b"tRNS", struct.pack(">H", 100)) + file[at:]
    decoded = to_pixels(file, 4)
    np.testing.assert_array_equal(decoded[..., 3], np.where(values == 100, 0, 255))
    np.testing.assert_array_equal(to_pixels(file, 1)[values == 100], 255)


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("CMYK", "JPEG", {}),
        ("CMYK", "TIFF", {}),
        ("CMYK", "TIFF", {"compression": "tiff_lzw"}),
        ("YCbCr", "JPEG", {}),
        ("YCbCr", "TIFF", {}),
        ("RGBX", "TIFF", {}),
    ],
    ids=["cmyk-jpeg", "cmyk-tiff", "cmyk-tiff-lzw", "ycbcr-jpeg", "ycbcr-tiff", "rgbx-tiff"],
)
def test_other_color_spaces_become_rgb_as_pillow_makes_them(mode: str, kind: str, options: dict) -> None:
    file = to_file(picture(mode), kind, **options)
    with Image.open(io.BytesIO(file)) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(to_pixels(file), expected)
    np.testing.assert_array_equal(to_pixels(file, 1), gray_of(expected))
    np.testing.assert_array_equal(to_pixels(file, 4), np.dstack([expected, np.full((HEIGHT, WIDTH), 255)]))


def test_lab_becomes_the_rgb_that_it_was_made_of() -> None:
    rgb = Image.new("RGB", (WIDTH, HEIGHT), (200, 120, 40))
    lab_profile, srgb_profile = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    lab = ImageCms.profileToProfile(rgb, srgb_profile, lab_profile, outputMode="LAB")
    # Lab in 8 bits has steps of a unit, which are up to 2 units of sRGB for this color.
    np.testing.assert_allclose(to_pixels(to_file(lab, "TIFF")), np.asarray(rgb), atol=3)


def test_premultiplied_color_is_divided_by_its_alpha() -> None:
    premultiplied = np.broadcast_to(np.array([100, 50, 25, 128], np.uint8), (HEIGHT, WIDTH, 4))
    decoded = to_pixels(tiff_of_rgba(premultiplied, extra_samples=1), 4)
    # 100 · 255 / 128 is 199.2; Pillow may round either way.
    np.testing.assert_allclose(decoded[0, 0], [199.2, 99.6, 49.8, 128], atol=1)


def tiff_of_rgba(rgba: np.ndarray, *, extra_samples: int) -> bytes:
    """A TIFF whose fourth sample is premultiplied alpha (1) or plain alpha (2)."""
    height, width, _ = rgba.shape
    return tiff_file(
        {256: width, 257: height, 258: (8, 8, 8, 8), 259: 1, 262: 2, 277: 4, 278: height, 338: extra_samples},
        rgba.tobytes(),
    )


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "PNG"), ("I;16B", "TIFF"), ("I", "TIFF")],
)
def test_each_16_bit_value_is_scaled_and_rounded(mode: str, kind: str) -> None:
    values = np.arange(65536).reshape(256, 256)
    raw = values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    file = to_file(Image.frombytes(mode, (256, 256), raw.tobytes()), kind)
    expected = np.round(values * 255 / 65535)
    np.testing.assert_array_equal(to_pixels(file, 1)[..., 0], expected)
    np.testing.assert_array_equal(to_pixels(file, 3), np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("window", [(0, 4095), (1000.5, 3000.25), (0, 65535), (-100, 70000)])
@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF")])
def test_a_window_spreads_its_values_from_black_to_white(mode: str, kind: str, window: tuple[float, float]) -> None:
    values = np.arange(65536).reshape(256, 256)
    raw = values.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode])
    file = to_file(Image.frombytes(mode, (256, 256), raw.tobytes()), kind)
    low, high = window
    expected = np.round(np.clip((values - low) * 255 / (high - low), 0, 255))
    for channels in (1, 3):
        decoded = decode(file, channels=channels, max_pixels=1_000_000, window=window)
        np.testing.assert_array_equal(decoded, np.repeat(expected[..., None], channels, axis=-1))


def test_a_window_leaves_a_transparent_16_bit_gray_white() -> None:
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH)
    file = to_file(Image.fromarray(values), "PNG")
    at = file.index(b"IDAT") - 4
    file = file[:at] + png_chunk(b"tRNS", struct.pack(">H", 100)) + file[at:]
    decoded = decode(file, channels=1, max_pixels=1_000_000, window=(0, 200))[..., 0]
    np.testing.assert_array_equal(
        decoded, np.where(values == 100, 255, np.round(np.minimum(values.astype(float) * 255 / 200, 255)))
    )


@each(EVERY)
def test_a_window_leaves_8_bits_alone(kind: str, options: dict) -> None:
    file = to_file(Image.fromarray(noise(3)), kind, **options)
    np.testing.assert_array_equal(decode(file, channels=3, max_pixels=1_000_000, window=(100, 110)), to_pixels(file))


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_32_bit_values_that_16_bits_cannot_hold_are_refused(value: int) -> None:
    values = np.zeros((HEIGHT, WIDTH), np.int32)
    values[2, 3] = value
    with pytest.raises(InvalidArgument, match=re.escape(f"{value:,}")):
        to_pixels(to_file(Image.fromarray(values), "TIFF"))


def test_float_pixels_are_refused_with_a_way_out() -> None:
    file = to_file(Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)), "TIFF")
    with pytest.raises(InvalidArgument, match="send a float array"):
        to_pixels(file)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_one_bit_is_black_or_white(kind: str) -> None:
    bits = noise(1)[..., 0] > 127
    decoded = to_pixels(to_file(Image.fromarray(bits), kind), 1)
    np.testing.assert_array_equal(decoded[..., 0], np.where(bits, 255, 0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})],
    ids=["gif", "apng", "webp", "tiff", "tiff-lzw"],
)
def test_the_first_frame_is_taken(kind: str, options: dict) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "lime", "blue")]
    file = to_file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(to_pixels(file), np.asarray(frames[0]))


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_how_a_gif_disposes_of_its_first_frame_does_not_matter(disposal: int) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "lime")]
    file = to_file(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=disposal)
    np.testing.assert_array_equal(to_pixels(file), np.asarray(frames[0]))


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: np.swapaxes(stored, 0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.swapaxes(np.rot90(stored, 2), 0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["png", "webp", "tiff", "tiff-lzw"])
def test_a_picture_is_turned_upright(name: str, orientation: int) -> None:
    kind, options = LOSSLESS[name]
    stored = noise(3)
    file = to_file(Image.fromarray(stored), kind, exif=exif(orientation), **options)
    np.testing.assert_array_equal(to_pixels(file), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_jpeg_is_turned_as_pillow_turns_it(orientation: int, channels: int) -> None:
    file = to_file(Image.fromarray(noise(3)), "JPEG", exif=exif(orientation))
    with Image.open(io.BytesIO(file)) as image:
        expected = ImageOps.exif_transpose(image).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    expected_pixels = np.asarray(expected).reshape(expected.height, expected.width, channels)
    np.testing.assert_array_equal(to_pixels(file, channels), expected_pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_first_page_of_a_tiff_is_turned_once(orientation: int) -> None:
    stored, other = Image.fromarray(noise(3)), Image.fromarray(noise(3, seed=1))
    file = to_file(stored, "TIFF", save_all=True, append_images=[other], exif=exif(orientation))
    np.testing.assert_array_equal(to_pixels(file), UPRIGHT[orientation](np.asarray(stored)))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    file = to_file(Image.fromarray(noise(3)), "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(to_pixels(file), noise(3))


def test_exif_that_is_no_exif_is_refused() -> None:
    exif = b"Exif\0\0" + b"no tags here, only words"
    for options in ({}, {"dpi": (72, 72)}):  # Pillow reads the EXIF of a JPEG while opening unless dpi are given
        assert "broken" in refusal(to_file(Image.fromarray(noise(3)), "JPEG", exif=exif, **options))


@pytest.mark.parametrize("channels", [0, 2, 5])
def test_a_model_of_other_channels_is_sent_arrays(channels: int) -> None:
    with pytest.raises(InvalidArgument, match=f"1, 3 or 4 channels, the model takes {channels}; send arrays"):
        to_pixels(to_file(Image.fromarray(noise(3)), "PNG"), channels)
