"""Drawing a map: the colors follow the values, and nothing else."""

import numpy as np
import pytest
from PIL import Image
from sidelight.visualization import overlay as _picture
from sidelight.visualization.colormaps import NAMES, NAN_COLOR, color_bar, color_scale, colorize
from sidelight.visualization.overlay import overlay, picture_of
from sidelight.visualization.styles import MAX_OPACITY, STYLES

# Linear sRGB to cone responses, and those to lightness: Ottosson 2020, "A perceptual color space for image processing".
CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
CONES_TO_LIGHTNESS = np.array([0.2105, 0.7936, -0.0041])


def grainy(height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).gamma(1.0, 1.0, (height, width)).astype(np.float32)


def photograph(width: int = 50, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def drawn(map_: np.ndarray, scale: float | None = None) -> np.ndarray:
    return np.asarray(colorize(map_, scale)).astype(np.int64)


def lightness(rgb: np.ndarray) -> np.ndarray:
    encoded = rgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ CONES.T) @ CONES_TO_LIGHTNESS


def test_the_scale_is_the_percentile_of_the_finite_magnitudes() -> None:
    map_ = grainy().astype(np.float64)
    map_[0, :3] = np.nan, np.inf, -np.inf
    map_[1] *= -1
    assert color_scale(map_) == (0.0, np.percentile(np.abs(map_[np.isfinite(map_)]), 99.5))


@pytest.mark.parametrize("value", [0.0, np.nan], ids=["zeros", "nan"])
def test_a_map_without_values_has_no_scale_and_is_one_color(value: float) -> None:
    map_ = np.full((6, 7), value)
    assert color_scale(map_) == (0.0, 0.0)
    assert len(np.unique(drawn(map_).reshape(-1, 3), axis=0)) == 1


def test_a_map_that_is_almost_all_zero_is_scaled_by_its_maximum() -> None:
    map_ = np.zeros((40, 50))
    map_[3, 4] = 2.0
    assert color_scale(map_) == (0.0, 2.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_large_constant_part_is_left_out_of_the_colors(sign: int) -> None:
    """Added to a map, a constant changes no color: it moves both ends of the scale."""
    map_ = grainy().astype(np.float64)
    raised, higher = (sign * (map_ + constant) for constant in (100.0, 300.0))
    low, high = color_scale(raised)
    assert (low, high) == tuple(np.percentile(np.abs(raised), [1.0, 99.5]))
    np.testing.assert_allclose(drawn(raised), drawn(higher), atol=1)
    assert np.ptp(drawn(raised).sum(axis=-1)) > 0.9 * np.ptp(drawn(map_).sum(axis=-1))


@pytest.mark.parametrize(
    "map_",
    [grainy(), grainy() + 0.1, np.full((40, 50), 3.0), 1 + 1e-5 * grainy(), 100 * np.where(grainy() > 1, -1, 1)],
    ids=["gradient", "small constant", "constant", "rounding", "both signs"],
)
def test_other_maps_are_drawn_from_zero(map_: np.ndarray) -> None:
    assert color_scale(map_)[0] == 0.0


def test_an_outlier_does_not_change_the_other_pixels() -> None:
    map_ = grainy()
    peak = np.unravel_index(map_.argmax(), map_.shape)
    wilder = map_.copy()
    wilder[peak] = 1e30
    np.testing.assert_array_equal(drawn(wilder), drawn(map_))


def test_only_the_ratio_to_the_scale_counts() -> None:
    np.testing.assert_array_equal(drawn(grainy() * 1024), drawn(grainy()))


def test_a_tiny_scale_is_no_division_by_zero() -> None:
    map_ = np.full((20, 20), 1e-320)
    map_[0, 0] = 1e300
    assert len(np.unique(drawn(map_).reshape(-1, 3), axis=0)) == 1


def test_larger_values_are_lighter() -> None:
    steps = lightness(drawn(np.linspace(0, 1, 64)[np.newaxis], 1.0)[0])  # coarser than the rounding to 8 bits
    assert (np.diff(steps) > 0).all()


def test_negating_a_map_swaps_the_halves_of_its_color_map() -> None:
    map_ = grainy()
    both = np.concatenate([map_, -map_])
    np.testing.assert_array_equal(drawn(-both), np.concatenate([drawn(both)[40:], drawn(both)[:40]]))


def test_neither_sign_is_lighter_than_the_other() -> None:
    values = np.linspace(0, 1, 64)[np.newaxis]
    above, below = lightness(drawn(np.concatenate([values, -values]), 1.0))
    assert np.abs(above - below).max() < 0.05  # of 1: the anchors are equally light, what lies between them nearly so


def test_zero_has_one_color_in_a_signed_map() -> None:
    map_ = np.array([[-1.0, 0.0, -0.0, 1.0]])
    np.testing.assert_array_equal(drawn(map_)[0, 1], drawn(map_)[0, 2])
    assert lightness(drawn(map_))[0].argmin() in (1, 2)


def test_nan_is_gray_and_infinity_is_the_brightest() -> None:
    map_ = grainy()
    map_[0, :2] = np.nan, np.inf
    assert tuple(drawn(map_)[0, 0]) == NAN_COLOR
    np.testing.assert_array_equal(drawn(map_)[0, 1], drawn(np.ones((1, 1)))[0, 0])


def test_a_map_is_never_altered() -> None:
    map_ = grainy()
    kept = map_.copy()
    colorize(map_)
    overlay(photograph(), map_)
    np.testing.assert_array_equal(map_, kept)


@pytest.mark.parametrize("size", [(50, 40), (300, 200), (7, 9)], ids=["same", "larger", "smaller"])
def test_an_overlay_has_the_maps_size(size: tuple[int, int]) -> None:
    laid = overlay(photograph(*size), grainy())
    assert (laid.size, laid.mode) == ((50, 40), "RGB")


@pytest.mark.parametrize("colormap", [None, *NAMES])
@pytest.mark.parametrize("size", [(50, 40), (300, 200)], ids=["same", "larger"])
def test_alpha_blends_from_the_picture_to_the_color_map(size: tuple[int, int], colormap: str | None) -> None:
    photo, map_ = photograph(*size), grainy() - 1
    picture = np.asarray(photo.resize((50, 40), Image.Resampling.LANCZOS)).astype(int)
    colors = np.asarray(colorize(map_, colormap=colormap)).astype(int)
    blended = [np.asarray(overlay(photo, map_, colormap=colormap, alpha=alpha)).astype(int) for alpha in (0, 0.5, 1)]
    np.testing.assert_array_equal(blended[0], picture)
    np.testing.assert_allclose(blended[1], (picture + colors) / 2, atol=0.5)
    np.testing.assert_array_equal(blended[2], colors)


def test_on_the_whole_picture_alpha_blends_only_what_the_model_saw() -> None:
    photo, box = photograph(300, 200), (100, 50, 150, 90)
    np.testing.assert_array_equal(overlay(photo, grainy(), box, alpha=0.0), photo)
    laid = np.asarray(overlay(photo, grainy(), box, alpha=1.0)).astype(int)
    np.testing.assert_allclose(laid[50:90, 100:150], drawn(grainy()), atol=1)
    laid[50:90, 100:150] = np.asarray(photo)[50:90, 100:150]
    np.testing.assert_array_equal(laid, photo)


def test_an_overlay_leaves_the_picture_more_and_more_as_values_grow() -> None:
    white = Image.new("RGB", (50, 40), "white")
    base = np.asarray(overlay(white, np.zeros((40, 50)))).astype(np.int64)
    laid = np.asarray(overlay(white, np.tile(np.linspace(0, 1, 50), (40, 1)), smoothing_px=0)).astype(np.int64)
    distance = np.abs(laid - base)[0, :, 2][:25]  # blue, on the half where the heat holds less and less of it
    assert distance[0] == 0
    assert (np.diff(distance) >= 0).all()
    assert distance[-1] > 0


def test_smoothing_keeps_an_even_map_even_up_to_its_edges() -> None:
    even = np.full((40, 50), 0.5)
    white = Image.new("RGB", (50, 40), "white")
    np.testing.assert_array_equal(
        overlay(white, even, scale=1.0, smoothing_px=5), overlay(white, even, scale=1.0, smoothing_px=0)
    )


def test_a_nan_is_gray_in_an_overlay_and_does_not_spread() -> None:
    map_ = np.full((40, 50), 0.5)
    map_[20, 20] = np.nan
    laid = np.asarray(overlay(Image.new("RGB", (50, 40)), map_, scale=1.0))
    assert tuple(laid[20, 20]) == tuple(np.rint(MAX_OPACITY * np.array(NAN_COLOR)))
    assert len(np.unique(laid.reshape(-1, 3), axis=0)) == 2


def test_a_signed_map_stays_signed_when_smoothing_drowns_its_negatives() -> None:
    map_ = np.ones((40, 50))
    map_[20, 20] = -0.01
    laid = np.asarray(overlay(Image.new("RGB", (50, 40)), map_))
    np.testing.assert_allclose(laid[0, 0], MAX_OPACITY * drawn(np.where(map_ < 0, -1.0, map_))[0, 0], atol=0.5)


def test_a_map_over_the_whole_of_a_picture_of_its_size_is_the_plain_overlay() -> None:
    for map_ in (grainy(), grainy() - 1):
        part = np.asarray(overlay(photograph(), map_, (0, 0, 50, 40))).astype(int)
        # The map goes through float32 on its way to another size.
        np.testing.assert_allclose(part, np.asarray(overlay(photograph(), map_)), atol=1)


def test_outside_of_the_part_a_picture_is_gray_and_dark_and_free_of_heat() -> None:
    photo = photograph(300, 200)
    drawn_ = np.asarray(overlay(photo, grainy(), (100, 50, 150, 90))).astype(int)
    inside = np.zeros((200, 300), bool)
    inside[50:90, 100:150] = True
    assert np.ptp(drawn_[~inside], axis=-1).max() == 0
    gray = np.asarray(photo.convert("L")).astype(int)
    assert (drawn_[..., 0] <= gray)[~inside].all()
    assert (drawn_[~inside] == np.asarray(overlay(photo, grainy() * 0, (100, 50, 150, 90)))[~inside]).all()
    part = overlay(photo.crop((100, 50, 150, 90)), grainy())
    np.testing.assert_allclose(drawn_[50:90, 100:150], np.asarray(part), atol=1)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (50, 40), (301, 97), (1, 2000)])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.3, 0.2, 0.31, 0.24), (0.999, 0.999, 1, 1), (0.1, 0, 0.7, 1)])
def test_a_picture_keeps_its_size_however_small_the_part(
    size: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    edges = tuple(share * side for share, side in zip(box, size * 2, strict=True))
    laid = overlay(photograph(*size), grainy(), edges)
    assert (laid.size, laid.mode) == (size, "RGB")


def test_the_hot_spot_lies_where_the_part_has_it() -> None:
    map_ = np.zeros((40, 50))
    map_[30, 10] = 1.0
    box = (200.0, 100.0, 700.0, 500.0)  # ten pixels for each of the map's
    laid = np.asarray(overlay(Image.new("RGB", (900, 600)), map_, box)).astype(int).sum(axis=-1)
    row, column = np.argwhere(laid == laid.max()).mean(axis=0)  # a few pixels are drawn brightest
    assert abs(row - (100 + 305)) <= 5
    assert abs(column - (200 + 105)) <= 5


@pytest.mark.parametrize("style", STYLES)
def test_bands_leave_no_seam(monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    photo, box = photograph(300, 200), (13.4, 5.5, 280.0, 191.7)
    whole = np.asarray(overlay(photo, grainy(), box, style=style)).astype(int)
    monkeypatch.setattr(_picture, "BAND_PIXELS", 1000)
    np.testing.assert_allclose(np.asarray(overlay(photo, grainy(), box, style=style)), whole, atol=1)


def disc(height: int = 80, width: int = 100, *, radius: float = 20.0) -> np.ndarray:
    """Return a cone with its peak in the middle: its largest values are those nearest to the peak."""
    y, x = np.ogrid[:height, :width]
    return np.maximum(0.0, 1 - np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) / (2 * radius))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("constant", [0.0, 50.0])
def test_a_mask_leaves_the_top_percent_of_a_picture(sign: int, constant: float) -> None:
    photo = photograph(100, 80)
    masked = np.asarray(overlay(photo, sign * (disc() + constant), style="mask", top_percent=20.0, smoothing_px=0))
    kept = (masked == np.asarray(photo)).all(axis=-1)
    assert abs(kept.mean() - 0.20) < 0.02  # the edge is blended
    assert disc()[kept].min() >= disc()[~kept].max() - 0.05  # two pixels


def test_contours_lie_where_the_top_percent_ends() -> None:
    white = Image.new("RGB", (100, 80), "white")
    lines = np.asarray(overlay(white, disc(), style="contours", top_percent=20.0, smoothing_px=0)).min(axis=-1) < 250
    distances = np.hypot(*(np.indices((80, 100)) - np.array([39.5, 49.5])[:, np.newaxis, np.newaxis]))
    radii = np.sqrt(80 * 100 * np.array([0.2, 0.1, 0.05]) / np.pi)
    reach = 3.0  # of a line with its halo, in pixels
    assert lines.any()
    assert np.abs(distances[lines][:, np.newaxis] - radii).min(axis=1).max() < reach
    for radius in radii:
        assert lines[np.abs(distances - radius) < 0.5].all()


@pytest.mark.parametrize("style", ["contours", "mask"])
@pytest.mark.parametrize("map_", [np.zeros((40, 50)), np.full((40, 50), np.nan)], ids=["zeros", "nan"])
def test_a_map_without_values_has_no_highlighted_pixels(style: str, map_: np.ndarray) -> None:
    drawn_ = np.asarray(overlay(Image.new("RGB", (50, 40), "white"), map_, style=style))
    assert len(np.unique(drawn_)) == 1


@pytest.mark.parametrize("style", ["contours", "mask"])
def test_styles_are_the_same_on_a_part_of_a_picture(style: str) -> None:
    photo = photograph(100, 80)
    whole = np.asarray(overlay(photo, disc(), style=style)).astype(int)
    np.testing.assert_allclose(np.asarray(overlay(photo, disc(), (0, 0, 100, 80), style=style)), whole, atol=1)
    part = np.asarray(overlay(photograph(300, 200), disc(), (100, 50, 200, 130), style=style)).astype(int)
    cropped = overlay(photograph(300, 200).crop((100, 50, 200, 130)), disc(), style=style)
    np.testing.assert_allclose(part[50:130, 100:200], np.asarray(cropped), atol=1)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_of_pixels_is_those_pixels(channels: int) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (5, 6, channels), dtype=np.uint8)
    pixels[..., 3:] = 255
    shown = np.asarray(picture_of(pixels))
    np.testing.assert_array_equal(shown, np.broadcast_to(pixels[..., :3], (5, 6, 3)))


def test_transparent_pixels_are_white() -> None:
    assert picture_of(np.zeros((5, 6, 4), np.uint8)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=["half", "single", "double"])
def test_a_picture_of_floats_spans_black_to_white(channels: int, dtype: type) -> None:
    array = np.random.default_rng(3).normal(size=(channels, 5, 6)).astype(dtype)
    shown = picture_of(array)
    assert (shown.size, shown.mode) == ((6, 5), "RGB")
    assert (np.asarray(shown).min(), np.asarray(shown).max()) == (0, 255)


def test_a_picture_of_equal_or_unknown_floats_is_one_color() -> None:
    for value in (3.0, np.nan):
        assert len(np.unique(np.asarray(picture_of(np.full((3, 5, 6), value))))) == 1


@pytest.mark.parametrize("array", [np.zeros((5, 6)), np.zeros((5, 6, 2), np.uint8), np.zeros((3, 5, 6), np.int64)])
def test_what_is_no_picture_is_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        picture_of(array)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.5},
        {"alpha": np.nan},
        {"colormap": "jet"},
        {"scale": -1.0},
        {"scale": np.nan},
        {"scale": (2.0, 1.0)},
        {"smoothing_px": -1.0},
        {"style": "lines"},
        {"alpha": 0.5, "style": "mask"},
        {"top_percent": 0.0, "style": "mask"},
        {"top_percent": 100.0, "style": "contours"},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
        overlay(photograph(), grainy(), **options)


@pytest.mark.parametrize("shape", [(3, 4, 5), (0, 4)], ids=["channels", "empty"])
def test_an_invalid_map_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[H, W\]"):
        colorize(np.zeros(shape))


def test_the_bar_shows_the_colors_of_a_map() -> None:
    ramp = np.linspace(0, 1, 30)
    np.testing.assert_array_equal(color_bar(30, 2), np.tile(drawn(ramp[np.newaxis], 1.0), (2, 1, 1)))
    np.testing.assert_array_equal(color_bar(31, 1, signed=True), drawn(np.linspace(-1, 1, 31)[np.newaxis], 1.0))
