"""Pictures of 8 bits: every form of a picture gives the same map."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from PIL import ExifTags, Image, ImageOps
from sidelight._inputs.images import EncodedBatch

from support.models import small_cnn
from support.pictures.arrays import JPEG, SHARE, TIFF, assert_same, encoded, noise


def test_a_pixel_that_is_off_by_one_shows_in_the_map(client: sidelight.Client, pixels: np.ndarray) -> None:
    other = pixels.copy()
    other[20, 25, 1] ^= 1
    maps, moved = client.attribute(pixels).maps, client.attribute(other).maps
    assert np.abs(maps - moved).max() > 10 * SHARE * maps.max()


class SomePath:
    """An `os.PathLike` that is no `Path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


ONE_PICTURE: dict[str, Callable[[np.ndarray, Path], object]] = {
    "path-as-str": lambda pixels, path: str(path),
    "path-as-numpy-str": lambda pixels, path: np.str_(path),
    "Path": lambda pixels, path: path,
    "PathLike": lambda pixels, path: SomePath(path),
    "bytes": lambda pixels, path: path.read_bytes(),
    "bytearray": lambda pixels, path: bytearray(path.read_bytes()),
    "memoryview": lambda pixels, path: memoryview(path.read_bytes()),
    "bytes-of-a-TIFF": lambda pixels, path: encoded(Image.fromarray(pixels), TIFF),
    "PIL-from-an-array": lambda pixels, path: Image.fromarray(pixels),
    "PIL-not-loaded-yet": lambda pixels, path: Image.open(io.BytesIO(path.read_bytes())),
    "[H,W,C]": lambda pixels, path: pixels,
    "[1,H,W,C]": lambda pixels, path: pixels[None],
    "[H,W,C]-in-Fortran-order": lambda pixels, path: np.asfortranarray(pixels),
    "[H,W,C]-reversed-twice": lambda pixels, path: pixels[::-1, ::-1].copy()[::-1, ::-1],
    "[H,W,C]-a-window-of-a-larger-one": lambda pixels, path: np.pad(pixels, ((3, 2), (1, 4), (0, 0)))[3:-2, 1:-4],
    "[H,W,C]-with-alpha-cut-off": lambda pixels, path: np.pad(pixels, ((0, 0), (0, 0), (0, 1)))[:, :, :3],
    "torch-[H,W,C]": lambda pixels, path: torch.from_numpy(pixels),
    "torch-[1,H,W,C]": lambda pixels, path: torch.from_numpy(pixels)[None],
    "torch-permuted": lambda pixels, path: torch.from_numpy(pixels.transpose(2, 0, 1).copy()).permute(1, 2, 0),
    "list-of-a-path": lambda pixels, path: [path],
    "tuple-of-a-path": lambda pixels, path: (str(path),),
    "list-of-bytes": lambda pixels, path: [path.read_bytes()],
    "list-of-a-bytearray": lambda pixels, path: [bytearray(path.read_bytes())],
    "list-of-a-memoryview": lambda pixels, path: [memoryview(path.read_bytes())],
    "list-of-a-PIL": lambda pixels, path: [Image.fromarray(pixels)],
    "list-of-an-array": lambda pixels, path: [pixels],
    "list-of-a-tensor": lambda pixels, path: [torch.from_numpy(pixels)],
}


@pytest.mark.parametrize("form", ONE_PICTURE.values(), ids=ONE_PICTURE.keys())
def test_a_picture_gives_the_same_map_in_every_form(
    client: sidelight.Client, pixels: np.ndarray, tmp_path: Path, form: Callable[[np.ndarray, Path], object]
) -> None:
    path = tmp_path / "a picture – ünïcode.png"
    Image.fromarray(pixels).save(path)
    expected, answer = client.attribute(pixels), client.attribute(form(pixels, path))
    assert_same(answer.maps, expected.maps)
    assert answer.predictions[0].index == expected.predictions[0].index
    assert answer.geometry == expected.geometry
    np.testing.assert_array_equal(np.asarray(answer.picture(0)), np.asarray(expected.picture(0)))


def over_white(rgba: np.ndarray) -> np.ndarray:
    color, alpha = rgba[..., :3].astype(int), rgba[..., 3:].astype(int)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def as_rgb(image: Image.Image) -> np.ndarray:
    """Return what a model should see of an image: alpha over white, 16 bits scaled, all else as Pillow converts."""
    if image.mode.startswith("I"):
        gray = ((np.asarray(image).astype(int) + 128) // 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode == "La":  # of what is multiplied by its alpha, Pillow can only undo that
        image = image.convert("LA")
    if image.has_transparency_data:
        return over_white(np.asarray(image.convert("RGBA")))
    return np.asarray(image.convert("RGB"))


def of_mode(mode: str) -> Image.Image:
    """Return a noisy 32 × 32 picture of a Pillow mode."""
    rgb, rgba = Image.fromarray(noise(32, 32)), Image.fromarray(noise(32, 32, 4))
    deep = np.random.default_rng(0).integers(0, 1 << 16, (32, 32), dtype=np.uint16)
    match mode:
        case "P":
            return rgb.quantize(64)
        case "P with one transparent color":
            image = rgb.quantize(64)
            image.info["transparency"] = 5
            return image
        case "P with an alpha for each color":
            image = rgb.quantize(64)
            image.info["transparency"] = bytes(range(0, 256, 4))
            return image
        case "RGB with a transparent color":
            rgb.info["transparency"] = rgb.getpixel((0, 0))
            return rgb
        case "L with a transparent gray":
            gray = rgb.convert("L")
            gray.info["transparency"] = 100
            return gray
        case "PA":
            return rgb.quantize(64).convert("PA")
        case "RGBa" | "RGBA":
            return rgba.convert(mode)
        case "LA" | "La":
            return rgba.convert("LA").convert(mode)
        case "LAB":
            return Image.frombytes("LAB", (32, 32), noise(32, 32).tobytes())
        case "I;16" | "I;16L":
            return Image.frombytes(mode, (32, 32), deep.astype("<u2").tobytes())
        case "I;16B":
            return Image.frombytes(mode, (32, 32), deep.astype(">u2").tobytes())
        case "I":
            return Image.fromarray(deep.astype(np.int32))
        case _:
            return rgb.convert(mode)


MODES = (
    "RGB", "L", "1", "P", "P with one transparent color", "P with an alpha for each color",
    "RGB with a transparent color", "L with a transparent gray", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "HSV",
    "I;16", "I;16B", "I;16L", "I", "PA", "La", "RGBa", "RGBX",
)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_a_pil_image_of_any_mode_gives_the_map_of_what_it_shows(client: sidelight.Client, mode: str) -> None:
    image = of_mode(mode)
    answer = client.attribute(image)
    assert_same(answer.maps, client.attribute(as_rgb(image)).maps)


@pytest.mark.parametrize("mode", MODES)
def test_the_answers_picture_of_a_pil_image_is_what_the_model_saw(client: sidelight.Client, mode: str) -> None:
    image = of_mode(mode)
    shown = np.asarray(client.attribute(image).picture(0)).astype(int)
    # Pillow rounds alpha over white in another way than the server does.
    np.testing.assert_allclose(shown, as_rgb(image), rtol=0, atol=1)


@pytest.mark.parametrize("mode", MODES)
def test_a_pil_image_is_left_as_it_was(client: sidelight.Client, mode: str) -> None:
    image = of_mode(mode)
    before = image.mode, image.size, image.tobytes(), dict(image.info), image.getpalette()
    client.attribute([image, image])
    assert (image.mode, image.size, image.tobytes(), dict(image.info), image.getpalette()) == before


def test_floating_pixels_are_refused_because_their_range_is_unknown(client: sidelight.Client) -> None:
    with pytest.raises(sidelight.PartialFailure, match="float pixels have no known range"):
        client.attribute(Image.fromarray(np.zeros((32, 32), np.float32)))


def test_a_pil_image_out_of_a_lossy_tiff_is_sent_without_a_second_loss(client: sidelight.Client) -> None:
    file = encoded(Image.fromarray(noise(40, 40)).convert("CMYK"), TIFF, compression="jpeg")
    image = Image.open(io.BytesIO(file))
    assert image.info["compression"] == "jpeg"
    assert_same(client.attribute(image).maps, client.attribute(file).maps)


def test_the_first_frame_of_an_animation_is_explained(client: sidelight.Client) -> None:
    first, second = (Image.fromarray(noise(32, 32, seed=seed)).quantize(64) for seed in (1, 2))
    file = encoded(first, "GIF", save_all=True, append_images=[second])
    expected = client.attribute(first).maps
    assert_same(client.attribute(file).maps, expected)
    assert_same(client.attribute(Image.open(io.BytesIO(file))).maps, expected)


def turned(orientation: int, **tags: object) -> bytes:
    """Return a JPEG with an EXIF orientation."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif.update({ExifTags.Base[name]: value for name, value in tags.items()})
    return encoded(Image.fromarray(noise(40, 60)), JPEG, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["file", "PIL"])
def test_a_photograph_is_turned_upright(client: sidelight.Client, orientation: int, form: str) -> None:
    file = turned(orientation)
    image = Image.open(io.BytesIO(file))
    upright = ImageOps.exif_transpose(image)
    answer = client.attribute(file if form == "file" else image)
    assert_same(answer.maps, client.attribute(np.asarray(upright)).maps)
    assert (answer.geometry[0].original_width, answer.geometry[0].original_height) == upright.size
    assert answer.picture(0).tobytes() == client.attribute(np.asarray(upright)).picture(0).tobytes()


def test_an_orientation_set_on_a_pil_image_counts(client: sidelight.Client, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = 6
    assert_same(client.attribute(image).maps, client.attribute(np.rot90(pixels, -1)).maps)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_of_the_exif_of_a_pil_image_only_the_orientation_is_sent(mode: str) -> None:
    image = Image.open(io.BytesIO(turned(6, Artist="Ann Example"))).convert(mode)
    (file,) = EncodedBatch(image).message.encoded.files
    sent = Image.open(io.BytesIO(file)).getexif()
    assert sent[ExifTags.Base.Orientation] == 6
    assert ExifTags.Base.Artist not in sent
    assert b"Ann Example" not in file
    assert image.getexif()[ExifTags.Base.Artist] == "Ann Example"


BATCHES: dict[str, Callable[[np.ndarray, Path], object]] = {
    "[N,H,W,C]": lambda pixels, folder: pixels,
    "[N,H,W,C]-every-second-of-more": lambda pixels, folder: np.repeat(pixels, 2, axis=0)[::2],
    "torch-[N,H,W,C]": lambda pixels, folder: torch.from_numpy(pixels),
    "list-of-arrays": lambda pixels, folder: list(pixels),
    "tuple-of-arrays": lambda pixels, folder: tuple(pixels),
    "list-of-tensors": lambda pixels, folder: list(torch.from_numpy(pixels)),
    "list-of-arrays-and-tensors": lambda pixels, folder: [pixels[0], torch.from_numpy(pixels[1]), pixels[2]],
    "list-of-PIL": lambda pixels, folder: [Image.fromarray(each) for each in pixels],
    "list-of-paths": lambda pixels, folder: sorted(folder.iterdir()),
    "list-of-paths-and-PIL": lambda pixels, folder: [
        folder / "0.png",
        Image.fromarray(pixels[1]),
        str(folder / "2.png"),
    ],
    "list-of-bytes-and-tensors": lambda pixels, folder: [
        (folder / "0.png").read_bytes(),
        torch.from_numpy(pixels[1]),
        bytearray((folder / "2.png").read_bytes()),
    ],
    "list-of-a-path-and-arrays": lambda pixels, folder: [folder / "0.png", pixels[1], pixels[2]],
}


@pytest.mark.parametrize("form", BATCHES.values(), ids=BATCHES.keys())
def test_every_form_of_a_batch_gives_each_picture_its_own_map(
    client: sidelight.Client, tmp_path: Path, form: Callable[[np.ndarray, Path], object]
) -> None:
    pixels = np.stack([noise(40, 50, seed=seed) for seed in range(3)])
    for i, each in enumerate(pixels):
        Image.fromarray(each).save(tmp_path / f"{i}.png")
    answer = client.attribute(form(pixels, tmp_path))
    assert_same(answer.maps, np.concatenate([client.attribute(each).maps for each in pixels]))


def test_pictures_of_different_sizes_share_a_batch(client: sidelight.Client, tmp_path: Path) -> None:
    arrays = [noise(40, 50), noise(33, 90, seed=1), noise(200, 31, seed=2), noise(32, 32, seed=3)]
    expected = np.concatenate([client.attribute(each).maps for each in arrays])
    answer = client.attribute(arrays)
    assert_same(answer.maps, expected)
    assert [(each.original_height, each.original_width) for each in answer.geometry] == [a.shape[:2] for a in arrays]
    assert_same(client.attribute([torch.from_numpy(each) for each in arrays]).maps, expected)


def test_in_a_list_of_different_sizes_gray_counts_for_three_channels_and_alpha_is_laid_over_white(
    client: sidelight.Client,
) -> None:
    gray, rgba = noise(40, 50, 1), noise(41, 50, 4)
    expected = [client.attribute(each).maps for each in (np.repeat(gray, 3, axis=2), over_white(rgba))]
    assert_same(client.attribute([gray, rgba]).maps, np.concatenate(expected))


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels_takes_files_and_arrays_alike(channels: int, device: str) -> None:
    pixels = noise(40, 50, channels)
    image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    spec = sidelight_server.ModelSpec(small_cnn(channels), input_size=(channels, 32, 32))
    with sidelight_server.serve(spec, device=device) as address, sidelight.connect(address) as client:
        expected = client.attribute(pixels)
        assert_same(client.attribute(image).maps, expected.maps)
        assert_same(client.attribute(encoded(image)).maps, expected.maps)
        assert_same(client.attribute([pixels, noise(32, 32, channels)]).maps[:1], expected.maps)
        assert expected.overlay(0).size == (32, 32)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("size", [(40, 50), (32, 32)], ids=["to-be-resized", "of-the-models-size"])
def test_an_array_of_other_channels_is_explained_as_its_file_is(
    client: sidelight.Client, channels: int, size: tuple[int, int]
) -> None:
    pixels = noise(*size, channels)
    file = encoded(Image.fromarray(pixels[..., 0] if channels == 1 else pixels))
    answer, expected = client.attribute(pixels), client.attribute(file)
    assert_same(answer.maps, expected.maps)
    assert answer.geometry == expected.geometry
    assert answer.picture(0).size == expected.picture(0).size == (32, 32)


def test_pixels_are_scaled_to_the_models_range(device: str) -> None:
    def served(**fields: object) -> sidelight_server.ModelSpec:
        return sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32), name="small", **fields)

    pixels = noise(32, 32)
    ready = (pixels.astype(np.float64) * (2048 / 255) - 1024 - 100) / 500
    with (
        sidelight_server.serve(served(pixel_range=(-1024, 1024), mean=(100,) * 3, std=(500,) * 3), device=device) as at,
        sidelight.connect(at) as client,
    ):
        preprocessing = client.info().models[0].preprocessing
        assert (preprocessing.pixel_range, preprocessing.window, preprocessing.mean) == (
            (-1024, 1024),
            None,
            (100, 100, 100),
        )
        expected = client.attribute(ready.astype(np.float32).transpose(2, 0, 1)[None]).maps
        np.testing.assert_allclose(client.attribute(pixels).maps, expected, rtol=0, atol=1e-4 * expected.max())
        black = client.attribute(pixels, method=sidelight.IntegratedGradients(steps=8, baseline="black")).maps
        baseline = np.full((3, 32, 32), (-1024 - 100) / 500, np.float32)
        same = client.attribute(pixels, method=sidelight.IntegratedGradients(steps=8, baseline=baseline)).maps
        np.testing.assert_allclose(black, same, rtol=0, atol=1e-5 * same.max())


@pytest.mark.parametrize(
    ("name", "value"), [("pixel_range", (1, 0)), ("window", (4095, 0)), ("pixel_range", (1, 2, 3))]
)
def test_an_invalid_pixel_range_is_refused_at_the_start(name: str, value: object) -> None:
    with (
        pytest.raises(sidelight_server.ConfigurationError, match=rf"{name}: got .*(, expected two|at most 2 items)"),
        sidelight_server.serve(sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32), **{name: value})),
    ):
        pass
