"""The picture that an answer shows, overlays on the original, and the geometry between them."""

import io
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from PIL import ExifTags, Image, ImageOps
from sidelight_server.inputs.preprocessing import Preprocessing

from support.models import small_cnn
from support.pictures.arrays import PNG, assert_same, encoded, noise


@pytest.mark.parametrize("size", [(40, 50), (50, 40), (32, 32), (33, 90), (200, 31), (10, 7), (1, 3000), (2000, 3)])
def test_the_picture_of_an_answer_is_the_resized_and_cropped_original(
    client: sidelight.Client, size: tuple[int, int]
) -> None:
    pixels = noise(*size)
    answer = client.attribute(pixels)
    geometry, picture = answer.geometry[0], answer.picture(0)
    scaled = Image.fromarray(pixels).resize((geometry.scaled_width, geometry.scaled_height), Image.Resampling.BILINEAR)
    right, bottom = geometry.crop_left + geometry.crop_width, geometry.crop_top + geometry.crop_height
    expected = scaled.crop((geometry.crop_left, geometry.crop_top, right, bottom))
    assert picture.mode == "RGB"
    assert picture.size == expected.size == answer.maps.shape[:0:-1]
    # The crop is cut while resizing, so a weight's last bit, and with it a byte, may be another.
    np.testing.assert_allclose(np.asarray(picture).astype(int), np.asarray(expected), rtol=0, atol=1)


def test_the_picture_of_floats_is_scaled_to_the_visible_range(client: sidelight.Client, floats: torch.Tensor) -> None:
    answer = client.attribute(floats)
    picture = np.asarray(answer.picture(2)).astype(float)
    assert (picture.min(), picture.max()) == (0, 255)
    values = floats[2].permute(1, 2, 0).numpy()
    expected = (values - values.min()) / np.ptp(values) * 255
    np.testing.assert_allclose(picture, expected, rtol=0, atol=0.51)


def test_the_picture_is_of_the_images_as_they_were_sent(client: sidelight.Client, pixels: np.ndarray) -> None:
    answer = client.attribute(pixels)
    before = answer.picture(0).tobytes()
    pixels[:] = 0
    assert answer.picture(0).tobytes() == before


@pytest.mark.parametrize("size", [(40, 50), (90, 33), (32, 32), (10, 7), (1, 3000)])
def test_an_overlay_on_the_original_is_of_its_size_and_bright_where_the_model_looked(
    client: sidelight.Client, size: tuple[int, int]
) -> None:
    pixels = np.full((*size, 3), (200, 30, 30), np.uint8)  # a color: what the model did not see has none
    answer = client.attribute(pixels)
    overlay, geometry = np.asarray(answer.overlay(0, original=True)).astype(int), answer.geometry[0]
    assert overlay.shape == pixels.shape
    rows, columns = size[0] / geometry.scaled_height, size[1] / geometry.scaled_width
    middle = overlay[size[0] // 2, size[1] // 2]
    assert np.ptp(middle) > 0
    seen = np.ptp(overlay, axis=-1) > 0
    expected = geometry.crop_height * rows * geometry.crop_width * columns
    assert abs(seen.sum() - expected) <= max(size) + 1  # edges fall between pixels


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_an_overlay_on_the_original_of_a_turned_photograph_is_upright(
    client: sidelight.Client, orientation: int
) -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    turned = encoded(Image.fromarray(noise(40, 90)), PNG, exif=tags)
    with Image.open(io.BytesIO(turned)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    answer, plain = client.attribute(turned), client.attribute(upright)
    np.testing.assert_array_equal(answer.overlay(0, original=True), plain.overlay(0, original=True))
    assert answer.overlay(0, original=True).size == upright.shape[1::-1]


def test_an_overlay_of_floats_is_the_same_with_original(client: sidelight.Client, floats: torch.Tensor) -> None:
    answer = client.attribute(floats)
    assert answer.overlay(1, original=True).tobytes() == answer.overlay(1).tobytes()


def test_saved_overlays_may_be_on_the_original(client: sidelight.Client, pixels: np.ndarray, tmp_path: Path) -> None:
    answer = client.attribute([pixels, pixels], target=sidelight.TopK(2))
    answer.save(tmp_path, original=True)
    for i, k in [(0, 0), (1, 1)]:
        with Image.open(tmp_path / f"{i:03}-{k}.png") as image:
            assert image.tobytes() == answer.overlay(i, k=k, original=True).tobytes()


def test_the_picture_of_16_bits_is_by_the_models_window(device: str) -> None:
    deep = np.random.default_rng(0).integers(0, 5000, (32, 32), dtype=np.uint16)
    spec = sidelight_server.ModelSpec(small_cnn(1), input_size=(1, 32, 32), window=(100, 4095))
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        answer = client.attribute([encoded(Image.fromarray(deep))])
        pixels = np.round(np.clip((deep.astype(float) - 100) * 255 / 3995, 0, 255)).astype(np.uint8)
        assert_same(answer.maps, client.attribute(pixels[..., None]).maps)
    assert answer.geometry[0].window == (100, 4095)
    np.testing.assert_array_equal(np.asarray(answer.picture(0))[..., 0], pixels)


@pytest.mark.parametrize("size", [(40, 50), (90, 33)], ids=["landscape", "portrait"])
@pytest.mark.parametrize("resize", [36, "40x37", "exact", "none"])
def test_the_geometry_says_what_the_model_saw_however_it_resizes(
    device: str, size: tuple[int, int], resize: int | str
) -> None:
    height, width = size
    side = 32 * min(size) / 36  # of the crop, in the picture's own pixels
    extents = {36: (side, side), "40x37": (32 * height / 40, 32 * width / 37), "exact": size, "none": (32, 32)}
    spec = sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32), resize=resize)
    color = np.full((*size, 3), (200, 30, 30), np.uint8)
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        answer = client.attribute([color, noise(*size)])
    seen = np.argwhere(np.ptp(np.asarray(answer.overlay(0, original=True)).astype(int), axis=-1) > 0)
    (top, left), (bottom, right) = seen.min(axis=0), seen.max(axis=0) + 1
    middle = ((top + bottom) / 2, (left + right) / 2)
    np.testing.assert_allclose(middle, (height / 2, width / 2), atol=1.5)
    np.testing.assert_allclose((bottom - top, right - left), extents[resize], atol=1.5)
    # The crop is cut while resizing, and each of two passes rounds.
    np.testing.assert_allclose(np.asarray(answer.picture(1)).astype(int), fitted_to_32(noise(*size), resize), atol=2)


def fitted_to_32(pixels: np.ndarray, resize: int | str) -> np.ndarray:
    fixed = Preprocessing(
        channels=3, height=32, width=32, mean=(0,) * 3, std=(1,) * 3, resize=resize, interpolation="bilinear"
    )
    return fixed.fit(pixels)[0]
