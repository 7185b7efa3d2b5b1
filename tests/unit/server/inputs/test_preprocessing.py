"""Resizing and cropping to the model's input size, compared with Pillow; the geometry is correct."""

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sidelight_server.errors import InvalidArgument
from sidelight_server.inputs import preprocessing
from sidelight_server.inputs.decoding import decode
from sidelight_server.inputs.preprocessing import Geometry, Preprocessing

from support.profiles import n_examples

FILTERS = ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]


def prepare(channels: int = 3, height: int = 32, width: int = 32, **fields: Any) -> Preprocessing:
    values = {"mean": (0.5,) * channels, "std": (0.25,) * channels, "resize": 36, "interpolation": "bilinear"}
    return Preprocessing(channels=channels, height=height, width=width, **(values | fields))


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def resized(pixels: np.ndarray, height: int, width: int, interpolation: str = "bilinear") -> np.ndarray:
    resample = Image.Resampling[interpolation.upper()]
    planes = [Image.fromarray(plane).resize((width, height), resample) for plane in np.moveaxis(pixels, -1, 0)]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def cut(pixels: np.ndarray, geometry: Geometry) -> np.ndarray:
    rows = slice(geometry.crop_top, geometry.crop_top + geometry.crop_height)
    columns = slice(geometry.crop_left, geometry.crop_left + geometry.crop_width)
    return pixels[rows, columns]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(50, 81), (81, 50), (20, 30), (36, 90), (200, 41)])
def test_a_picture_is_what_pillow_resizes_and_a_crop_cuts(height: int, width: int, interpolation: str) -> None:
    pixels = noise(height, width)
    fitted, geometry = prepare(interpolation=interpolation).fit(pixels)
    scale = 36 / min(height, width)
    scaled = (36, int(width * scale)) if height <= width else (int(height * scale), 36)
    assert (geometry.scaled_height, geometry.scaled_width) == scaled
    image = Image.fromarray(pixels).resize(scaled[::-1], Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(fitted, cut(np.asarray(image), geometry))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("resize", [36, "exact"])
def test_each_channel_is_resized_by_itself(channels: int, resize: int | str) -> None:
    pixels = noise(50, 81, channels)
    fitted, geometry = prepare(channels, resize=resize).fit(pixels)
    assert fitted.shape == (32, 32, channels)
    assert fitted.dtype == np.uint8
    assert fitted.flags.writeable
    np.testing.assert_array_equal(fitted, cut(resized(pixels, geometry.scaled_height, geometry.scaled_width), geometry))


def test_a_fourth_channel_of_zeros_hides_no_color() -> None:
    pixels = np.full((50, 81, 4), 200, np.uint8)
    pixels[..., 3] = 0
    fitted, _ = prepare(4).fit(pixels)
    np.testing.assert_array_equal(fitted[..., :3], 200)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (300, 2), (32, 32), (1000, 1000)])
def test_one_color_stays_that_color(shape: tuple[int, int], interpolation: str) -> None:
    fitted, _ = prepare(interpolation=interpolation).fit(np.full((*shape, 3), (7, 130, 255), np.uint8))
    np.testing.assert_array_equal(fitted, np.broadcast_to(np.array([7, 130, 255], np.uint8), (32, 32, 3)))


def test_the_usual_imagenet_numbers_come_out() -> None:
    _, geometry = prepare(height=224, width=224, resize=256).fit(noise(375, 500))
    assert geometry == Geometry(
        original_height=375,
        original_width=500,
        scaled_height=256,
        scaled_width=341,
        crop_top=16,
        crop_left=58,  # 58.5, rounded to even as torchvision does
        crop_height=224,
        crop_width=224,
    )


@pytest.mark.parametrize(
    ("original", "scaled"),
    [((100, 100), (96, 96)), ((200, 100), (192, 96)), ((100, 200), (48, 96)), ((100, 1000), (40, 400))],
    ids=["square", "tall", "wide-as-the-crop", "wider-than-the-crop"],
)
def test_a_picture_is_enlarged_until_a_wide_crop_fits(original: tuple[int, int], scaled: tuple[int, int]) -> None:
    fitted, geometry = prepare(height=32, width=96, resize=40).fit(noise(*original))
    assert fitted.shape == (32, 96, 3)
    assert (geometry.scaled_height, geometry.scaled_width) == scaled


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(50, 81), (20, 30), (45, 39), (200, 41)])
def test_a_picture_is_resized_to_two_sides_and_its_centre_cut_out(height: int, width: int, interpolation: str) -> None:
    pixels = noise(height, width)
    fitted, geometry = prepare(height=32, width=28, resize="45x39", interpolation=interpolation).fit(pixels)
    assert geometry == Geometry(
        original_height=height,
        original_width=width,
        scaled_height=45,
        scaled_width=39,
        crop_top=6,  # 6.5, rounded to even
        crop_left=6,  # 5.5, rounded to even
        crop_height=32,
        crop_width=28,
    )
    image = Image.fromarray(pixels).resize((39, 45), Image.Resampling[interpolation.upper()])
    np.testing.assert_array_equal(fitted, np.asarray(image)[6:38, 6:34])


def test_a_crop_of_a_huge_picture_of_two_sides_is_resized_by_itself() -> None:
    ramp = np.broadcast_to(np.arange(0, 256, dtype=np.uint8)[None, :, None], (40, 256, 3)).copy()
    fitted, geometry = prepare(height=32, width=32, resize="100x400000").fit(ramp)
    assert (geometry.scaled_height, geometry.scaled_width) == (100, 400_000)
    assert set(np.unique(fitted)) <= {127, 128}  # the middle of the ramp


@pytest.mark.parametrize("margin", range(9))
def test_an_odd_margin_is_halved_as_torchvision_does_or_as_transformers_does(margin: int) -> None:
    pixels = noise(32 + margin, 32)
    torchvision, transformers = int(round(margin / 2.0)), margin // 2  # noqa: RUF046  (as it is written there)
    assert prepare(resize="none").fit(pixels)[1].crop_top == torchvision
    assert prepare(resize="none", odd_margin="floor").fit(pixels)[1].crop_top == transformers


def test_a_short_side_of_one_just_covers_the_input() -> None:
    _, geometry = prepare(height=32, width=48, resize=1).fit(noise(100, 100))
    assert (geometry.scaled_height, geometry.scaled_width) == (48, 48)


sides = st.integers(1, 400)


@settings(max_examples=n_examples(150))
@given(sides, sides, st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.sampled_from([1, 3, 4]))
def test_the_crop_lies_in_the_middle_of_a_picture_that_keeps_its_aspect(
    original_height: int, original_width: int, height: int, width: int, resize: int, channels: int
) -> None:
    preparing = prepare(channels, height, width, resize=resize)
    fitted, geometry = preparing.fit(np.zeros((original_height, original_width, channels), np.uint8))
    assert fitted.shape == (geometry.crop_height, geometry.crop_width, channels) == (height, width, channels)
    assert (geometry.original_height, geometry.original_width) == (original_height, original_width)
    assert min(geometry.scaled_height, geometry.scaled_width) >= resize
    for scaled, start, length in (
        (geometry.scaled_height, geometry.crop_top, height),
        (geometry.scaled_width, geometry.crop_left, width),
    ):
        assert start >= 0
        assert start + length <= scaled
        assert abs(start - (scaled - length - start)) <= 1
    # The long side is cut to an integer, so the aspects differ by less than one pixel of it.
    long, short = max(geometry.scaled_height, geometry.scaled_width), min(geometry.scaled_height, geometry.scaled_width)
    exact = short * max(original_height, original_width) / min(original_height, original_width)
    assert exact - 1 < long <= exact


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(50, 81), (10, 300), (32, 31)])
def test_exact_resizes_straight_to_the_input(height: int, width: int, interpolation: str) -> None:
    pixels = noise(height, width)
    fitted, geometry = prepare(height=32, width=48, resize="exact", interpolation=interpolation).fit(pixels)
    assert (geometry.scaled_height, geometry.scaled_width) == (32, 48)
    assert (geometry.crop_top, geometry.crop_left) == (0, 0)
    np.testing.assert_array_equal(fitted, resized(pixels, 32, 48, interpolation))


def test_none_cuts_the_centre_out_without_a_copy() -> None:
    pixels = noise(50, 81)
    fitted, geometry = prepare(resize="none").fit(pixels)
    np.testing.assert_array_equal(fitted, pixels[9:41, 24:56])
    assert (geometry.crop_top, geometry.crop_left) == (9, 24)
    assert np.shares_memory(fitted, pixels)


@pytest.mark.parametrize(("height", "width"), [(31, 80), (80, 31), (1, 1)])
def test_without_resizing_a_picture_smaller_than_the_input_is_refused(height: int, width: int) -> None:
    with pytest.raises(InvalidArgument, match=f"image: {height} × {width} pixels, the model takes 32 × 32 or more"):
        prepare(resize="none").fit(noise(height, width))


@pytest.mark.parametrize("resize", [32, 1, "exact", "none"])
def test_a_picture_of_the_input_size_is_not_touched(resize: int | str) -> None:
    pixels = noise(32, 32)
    fitted, _ = prepare(resize=resize).fit(pixels)
    assert np.shares_memory(fitted, pixels)
    np.testing.assert_array_equal(fitted, pixels)


@pytest.mark.parametrize("resize", [36, "exact", "none"])
def test_fitting_does_not_change_the_given_pixels(resize: int | str) -> None:
    pixels = noise(50, 81)
    pixels.flags.writeable = False
    before = pixels.copy()
    prepare(resize=resize).fit(pixels)
    np.testing.assert_array_equal(pixels, before)


def test_a_view_with_strides_is_read_as_numpy_reads_it() -> None:
    view = noise(162, 100).swapaxes(0, 1)[::2, ::-2]
    fitted, _ = prepare().fit(view)
    expected, _ = prepare().fit(view.copy())
    np.testing.assert_array_equal(fitted, expected)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(50, 81), (20, 500), (500, 20), (1, 40), (40, 1), (700, 650)])
def test_resizing_only_what_the_crop_shows_is_resizing_and_cropping(
    height: int, width: int, interpolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = noise(height, width)
    whole, _ = prepare(interpolation=interpolation).fit(pixels)
    monkeypatch.setattr(preprocessing, "MAX_SCALED_PIXELS", 1)
    part, _ = prepare(interpolation=interpolation).fit(pixels)
    if interpolation in ("nearest", "box"):
        # These two jump: where a sample falls just between two source pixels, rounding decides which one it takes.
        assert (part == whole).mean() > 0.85
    else:
        # Pillow rounds its weights to 8.22 fixed point after the box went through float32: one unit at most.
        np.testing.assert_allclose(part.astype(int), whole, atol=1)


@pytest.mark.parametrize("interpolation", FILTERS)
def test_columns_before_rows_is_rows_before_columns(interpolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = noise(700, 20)
    plain, _ = prepare(resize="exact", interpolation=interpolation).fit(pixels)
    monkeypatch.setattr(preprocessing, "MAX_SCALED_PIXELS", 32 * 32)
    turned, _ = prepare(resize="exact", interpolation=interpolation).fit(pixels)
    # Each of the two passes rounds to 8 bits, in either order.
    np.testing.assert_allclose(turned.astype(int), plain, atol=2)


@pytest.mark.parametrize("resize", [256, "exact"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1), (1, 3_000_000), (3_000_000, 1)])
def test_a_picture_of_absurd_aspect_is_fitted(shape: tuple[int, int], channels: int, resize: int | str) -> None:
    # Plain resizing would pass through 12 GB for the mildest of these, and through 1.9 TB for the worst.
    length = max(shape)
    ramp = np.linspace(0, 255, length).astype(np.uint8).reshape(*shape, 1)
    fitted, geometry = prepare(channels, 224, 224, resize=resize).fit(np.repeat(ramp, channels, axis=-1))
    assert fitted.shape == (224, 224, channels)
    along = fitted[..., 0] if shape[0] == 1 else fitted[..., 0].T  # [across, along]
    if resize == "exact":
        # Averages of equal pieces of a ramp, and Pillow's rounding.
        np.testing.assert_allclose(along[0], (np.arange(224) + 0.5) * 255 / 224, atol=1.5)
    else:
        assert max(geometry.scaled_height, geometry.scaled_width) == 256 * length
        assert set(np.unique(along)) <= {126, 127, 128}  # the crop shows less than a pixel of the middle


def test_a_crop_from_deep_inside_a_long_picture_shows_the_right_pixels() -> None:
    pixels = np.zeros((1, 100_000, 1), np.uint8)
    pixels[0, 50_000:] = 255  # the edge is the middle of the picture, so the middle of the crop
    fitted, _ = prepare(1, 224, 224, resize=256, interpolation="nearest").fit(pixels)
    assert (fitted[:, :111] == 0).all()
    assert (fitted[:, 113:] == 255).all()


@pytest.mark.parametrize(("given", "wanted"), [(1, 3), (3, 1), (4, 3), (4, 1)])
@pytest.mark.parametrize("size", [(50, 81), (32, 32)], ids=["to-be-resized", "of-the-models-size"])
@pytest.mark.parametrize("resize", [36, 32, "exact", "none"])
def test_an_array_becomes_what_a_file_of_it_becomes(
    given: int, wanted: int, size: tuple[int, int], resize: int | str
) -> None:
    pixels = noise(*size, given)
    before = pixels.copy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if given == 1 else pixels).save(file, "PNG")
    decoded = decode(file.getvalue(), channels=wanted, max_pixels=1_000_000)
    fitted, geometry = prepare(wanted, resize=resize).fit(pixels)
    expected, expected_geometry = prepare(wanted, resize=resize).fit(decoded)
    np.testing.assert_array_equal(fitted, expected)
    assert geometry == expected_geometry
    np.testing.assert_array_equal(pixels, before)


def test_color_becomes_its_luma_and_gray_is_repeated() -> None:
    rgb, gray = noise(32, 32), noise(32, 32, 1)
    # ITU-R 601-2 in 16 bits of fixed point, as Pillow has it for its mode "L".
    luma = (rgb.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32) + 0x8000) >> 16
    np.testing.assert_array_equal(prepare(1).fit(rgb)[0], prepare(1).fit(luma[..., None].astype(np.uint8))[0])
    np.testing.assert_array_equal(prepare(3).fit(gray)[0], np.repeat(prepare(1).fit(gray)[0], 3, axis=-1))


def test_alpha_of_an_array_is_laid_over_white() -> None:
    rgba = noise(32, 32, 4)
    share = rgba[..., 3:] / 255
    white = np.floor(rgba[..., :3] * share + 255 * (1 - share) + 0.5)
    np.testing.assert_array_equal(prepare(3, resize=32).fit(rgba)[0], white)


@pytest.mark.parametrize(("given", "wanted"), [(2, 3), (5, 3), (3, 4), (1, 4), (2, 1), (3, 2), (1, 2)])
def test_other_channels_than_the_model_wants_are_refused(given: int, wanted: int) -> None:
    with pytest.raises(InvalidArgument, match=f"image: {given} channels, the model takes {wanted}"):
        prepare(wanted).fit(noise(50, 81, given))


@pytest.mark.parametrize(
    ("channels", "size", "resize", "taken"),
    [
        (3, (32, 32), 32, True),
        (3, (32, 32), "exact", True),
        (3, (32, 32), 36, False),
        (3, (50, 32), 32, False),
        (1, (32, 32), 32, False),
        (4, (32, 32), 32, False),
    ],
)
def test_an_array_that_needs_no_conversion_is_not_copied(
    channels: int, size: tuple[int, int], resize: int | str, taken: bool
) -> None:
    pixels = noise(*size, channels)
    assert prepare(resize=resize).leaves(*pixels.shape) is taken
    if taken:
        assert np.shares_memory(prepare(resize=resize).fit(pixels)[0], pixels)


def test_mean_and_std_are_in_units_of_the_pixel_range() -> None:
    for low, high in [(0.0, 1.0), (-1.0, 1.0), (-1024.0, 1024.0), (0.0, 255.0), (3.5, 4.25)]:
        fixed = prepare(mean=(0.1, 0.2, -3.0), std=(0.5, 2.0, 1e3), pixel_range=(low, high))
        pixels = np.arange(256.0)[:, None]
        expected = (pixels * (high - low) / 255 + low - np.array(fixed.mean)) / fixed.std
        folded = (pixels - fixed.mean_in_pixels) / fixed.std_in_pixels
        np.testing.assert_allclose(folded, expected, rtol=1e-12, atol=1e-9)


def test_without_a_pixel_range_mean_and_std_are_multiplied_by_255_and_nothing_else() -> None:
    fixed = prepare(mean=(0.485, 0.456, 0.0), std=(0.229, 0.224, 0.225))
    assert fixed.mean_in_pixels == tuple(each * 255 for each in fixed.mean)
    assert fixed.std_in_pixels == tuple(each * 255 for each in fixed.std)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((40, 40, 3), np.float32), np.zeros((40, 40), np.uint8), np.zeros((0, 40, 3), np.uint8)],
    ids=["float", "no-channels", "no-rows"],
)
def test_what_is_no_picture_is_refused(pixels: np.ndarray) -> None:
    with pytest.raises(InvalidArgument, match=r"expected uint8 \[H, W, C\]"):
        prepare().fit(pixels)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("channels", 0, "an integer from 1 up"),
        ("height", -1, "an integer from 1 up"),
        ("width", 2.0, "an integer from 1 up"),
        ("width", True, "an integer from 1 up"),
        ("mean", (0.5, 0.5), "a tuple of 3 finite numbers"),
        ("mean", [0.5, 0.5, 0.5], "a tuple of 3 finite numbers"),
        ("mean", (0.5, 0.5, float("nan")), "a tuple of 3 finite numbers"),
        ("std", (0.5, 0.5, "0.5"), "a tuple of 3 finite numbers"),
        ("std", (0.5, 0.0, 0.5), "numbers above 0"),
        ("resize", 0, 'an integer from 1 up, "HEIGHTxWIDTH", "exact" or "none"'),
        ("resize", "crop", 'an integer from 1 up, "HEIGHTxWIDTH", "exact" or "none"'),
        ("resize", None, 'an integer from 1 up, "HEIGHTxWIDTH", "exact" or "none"'),
        ("resize", "0x40", 'an integer from 1 up, "HEIGHTxWIDTH", "exact" or "none"'),
        ("resize", "40x040", 'an integer from 1 up, "HEIGHTxWIDTH", "exact" or "none"'),
        ("resize", "40 x 40", 'an integer from 1 up, "HEIGHTxWIDTH", "exact" or "none"'),
        ("resize", "40x40x3", 'an integer from 1 up, "HEIGHTxWIDTH", "exact" or "none"'),
        ("resize", "32x31", "at least 32 × 32, the input size, and at most 2,147,483,647 along each side"),
        ("resize", "32x2147483648", "at least 32 × 32, the input size, and at most 2,147,483,647 along each side"),
        ("odd_margin", "ceil", "one of round, floor"),
        ("pixel_range", (1.0, 1.0), "two finite numbers, the lower one first"),
        ("pixel_range", (1.0, -1.0), "two finite numbers, the lower one first"),
        ("pixel_range", (0.0, float("inf")), "two finite numbers, the lower one first"),
        ("pixel_range", (0.0, 1.0, 2.0), "two finite numbers, the lower one first"),
        ("pixel_range", None, "two finite numbers, the lower one first"),
        ("window", (float("nan"), 1.0), "two finite numbers, the lower one first"),
        ("window", (4095, 0), "two finite numbers, the lower one first"),
        ("interpolation", "cubic", "one of nearest, box, bilinear, hamming, bicubic, lanczos"),
    ],
)
def test_a_field_with_an_invalid_value_is_named(field: str, value: object, expected: str) -> None:
    fields = {
        "channels": 3,
        "height": 32,
        "width": 32,
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "resize": 36,
        "interpolation": "bilinear",
    }
    with pytest.raises(ValueError, match=f"^{field}: got ") as caught:
        Preprocessing(**(fields | {field: value}))
    assert str(caught.value).endswith(f"expected {expected}")
