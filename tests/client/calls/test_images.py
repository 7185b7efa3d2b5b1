"""All forms of images: each form of a picture gives the same map, and no input is changed."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
import torch
from PIL import ExifTags, Image, ImageOps
from sidelight._inputs.images import EncodedBatch
from sidelight_server.inputs.preprocessing import Preprocessing

from support.models import small_cnn

# The contract: neighbors change a map by at most a millionth of its maximum. A pixel off by one changes it by more.
SHARE = 1e-6
PNG, JPEG, TIFF = "PNG", "JPEG", "TIFF"


def noise(height: int, width: int, channels: int = 3, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = PNG, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def assert_same(maps: np.ndarray, expected: np.ndarray) -> None:
    assert maps.shape == expected.shape
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, expected, rtol=0, atol=SHARE * expected.max(initial=0))


@pytest.fixture
def pixels() -> np.ndarray:
    return noise(40, 50)


@pytest.fixture
def nobody() -> Iterator[sidelight.Client]:
    """A client without a server: it rejects these inputs before it sends anything."""
    with sidelight.connect("unix:/nonexistent/socket", connect_timeout=0) as client:
        yield client


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


def test_floating_pixels_are_refused_as_nobody_knows_their_range(client: sidelight.Client) -> None:
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
def test_a_batch_gives_each_picture_its_own_map_in_every_form(
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


@pytest.fixture
def exact() -> np.ndarray:
    """Model-ready examples, [3, 3, 32, 32], that every floating type holds exactly: sixteenths below 8."""
    values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return ((values * 16).round() / 16).clamp(-7.9375, 7.9375).numpy()


FLOATS: dict[str, Callable[[np.ndarray], object]] = {
    "float16": lambda x: x.astype(np.float16),
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
    "big-endian-float16": lambda x: x.astype(">f2"),
    "big-endian-float32": lambda x: x.astype(">f4"),
    "big-endian-float64": lambda x: x.astype(">f8"),
    "Fortran-order": lambda x: np.asfortranarray(x),
    "transposed": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "reversed": lambda x: x[::-1].copy()[::-1],
    "every-second": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "broadcast-view-made-whole": lambda x: np.broadcast_to(x[:, None], (3, 1, 3, 32, 32))[:, 0],
    "list": lambda x: list(x),
    "list-of-both-byte-orders": lambda x: [x[0], x[1].astype(">f4"), x[2]],
    "torch-float16": lambda x: torch.from_numpy(x).half(),
    "torch-bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "torch-float32": lambda x: torch.from_numpy(x),
    "torch-float64": lambda x: torch.from_numpy(x).double(),
    "torch-that-requires-grad": lambda x: torch.from_numpy(x.copy()).requires_grad_(),
    "torch-inside-a-graph": lambda x: torch.from_numpy(x.copy()).requires_grad_() * 1,
    "torch-parameter": lambda x: torch.nn.Parameter(torch.from_numpy(x.copy())),
    "torch-channels-last": lambda x: torch.from_numpy(x).to(memory_format=torch.channels_last),
    "torch-bfloat16-that-requires-grad-and-is-transposed": lambda x: (
        torch.from_numpy(x).bfloat16().transpose(2, 3).contiguous().requires_grad_().transpose(2, 3)
    ),
    "torch-list": lambda x: list(torch.from_numpy(x)),
    "torch-list-of-bfloat16": lambda x: list(torch.from_numpy(x).bfloat16()),
    "list-of-tensors-and-arrays": lambda x: [torch.from_numpy(x[0]).requires_grad_(), x[1], x[2]],
}


@pytest.mark.parametrize("form", FLOATS.values(), ids=FLOATS.keys())
def test_floats_give_the_same_maps_in_every_form(
    client: sidelight.Client, exact: np.ndarray, form: Callable[[np.ndarray], object]
) -> None:
    answer = client.attribute(form(exact))
    assert_same(answer.maps, client.attribute(exact).maps)
    assert answer.geometry == (None, None, None)


@pytest.mark.parametrize("form", [lambda x: x, torch.from_numpy, lambda x: [x], lambda x: x[None]])
def test_one_example_of_floats_is_a_batch_of_one(
    client: sidelight.Client, exact: np.ndarray, form: Callable[[np.ndarray], object]
) -> None:
    assert_same(client.attribute(form(exact[1])).maps, client.attribute(exact).maps[1:2])


def test_an_array_mapped_from_a_file_is_an_array(client: sidelight.Client, exact: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", exact)
    assert_same(client.attribute(np.load(tmp_path / "x.npy", mmap_mode="r")).maps, client.attribute(exact).maps)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, ">f4", np.float16])
def test_arrays_are_left_as_they_were_and_need_not_be_writable(client: sidelight.Client, dtype: object) -> None:
    array = noise(32, 32) if dtype == np.uint8 else noise(3, 32, 32).astype(dtype)
    array.setflags(write=False)
    before = array.copy(), array.dtype, array.strides
    client.attribute(array)
    client.attribute([array, array]).overlay(1)
    np.testing.assert_array_equal(array, before[0])
    assert (array.dtype, array.strides) == before[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tensors_are_left_as_they_were(client: sidelight.Client, floats: torch.Tensor, dtype: torch.dtype) -> None:
    tensor = floats.to(dtype).requires_grad_()
    before, version = tensor.detach().clone(), tensor._version
    client.attribute(tensor, method=sidelight.Gradient(times_input=True)).overlay(0)
    assert torch.equal(tensor, before)
    assert (tensor.requires_grad, tensor.is_leaf, tensor.grad, tensor.dtype) == (True, True, None, dtype)
    assert tensor._version == version


def test_a_list_is_left_as_it_was(client: sidelight.Client, pixels: np.ndarray) -> None:
    given = [Image.fromarray(pixels), pixels, torch.from_numpy(pixels), bytearray(encoded(Image.fromarray(pixels)))]
    before = list(given)
    client.attribute(given)
    assert len(given) == 4
    assert all(each is was for each, was in zip(given, before, strict=True))


@pytest.mark.parametrize(
    "nothing",
    [[], (), np.empty((0, 40, 50, 3), np.uint8), np.empty((0, 3, 32, 32), np.float32), torch.empty(0, 3, 32, 32)],
    ids=["list", "tuple", "pixels", "floats", "tensor"],
)
def test_a_batch_of_nothing_has_no_maps(client: sidelight.Client, nothing: object) -> None:
    answer = client.attribute(nothing)
    assert answer.maps.shape == (0, 32, 32)
    assert len(answer) == len(answer.predictions) == len(answer.targets) == len(answer.geometry) == 0


F32 = np.zeros((3, 32, 32), np.float32)
KINDS = "expected a path, encoded bytes, a PIL image, an array, a tensor, or a list of them"
DTYPES = "expected uint8 pixels [H, W, C], or model-ready float16, float32 or float64 [C, H, W]"
RANKS = "expected [C, H, W] or [N, C, H, W]"
PIXEL_RANKS = "expected [H, W, C] or [N, H, W, C]"
ALIKE = "floating arrays of a batch must be of one shape and type"
IN_A_LIST = "among files or arrays of other sizes, expected uint8 [H, W, C] with 1, 3 or 4 channels"


def closed_image() -> Image.Image:
    with Image.open(io.BytesIO(encoded(Image.fromarray(noise(8, 8))))) as image:
        return image


REFUSED: dict[str, tuple[Callable[[], object], str, str]] = {
    "None": (lambda: None, "got NoneType", KINDS),
    "dict": (dict, "got dict", KINDS),
    "set": (lambda: {"a.png"}, "got set", KINDS),
    "generator": (lambda: (each for each in [F32]), "got generator", KINDS),
    "number": (lambda: 3, "got int", KINDS),
    "open-file": (lambda: io.BytesIO(b""), "got BytesIO", KINDS),
    "numpy-scalar": (lambda: np.float32(1), "got float32", KINDS),
    "list-of-None": (lambda: [None], "got NoneType in the list", KINDS),
    "list-of-lists-of-numbers": (lambda: [[1.0, 2.0]], "got list in the list", KINDS),
    "list-of-lists-of-pictures": (lambda: [[F32]], "got list in the list", KINDS),
    "range": (lambda: range(3), "got int in the list", KINDS),
    "path-and-None": (lambda: [b"", None], "got NoneType in the list", KINDS),
    "int64": (lambda: np.zeros((32, 32, 3), np.int64), "got int64 of [32, 32, 3]", DTYPES),
    "uint16": (lambda: np.zeros((32, 32, 3), np.uint16), "got uint16 of [32, 32, 3]", DTYPES),
    "bool": (lambda: np.zeros((32, 32, 3), bool), "got bool of [32, 32, 3]", DTYPES),
    "complex": (lambda: np.zeros((3, 32, 32), np.complex64), "got complex64 of [3, 32, 32]", DTYPES),
    "long-double": (lambda: np.zeros((3, 32, 32), np.longdouble), "of [3, 32, 32]", DTYPES),
    "object": (lambda: np.array([None, None]), "got object of [2]", DTYPES),
    "array-of-names": (lambda: np.array(["a.png"]), "got <U5 of [1]", DTYPES),
    "list-of-int64": (lambda: [np.zeros((32, 32, 3), np.int64)], "got int64 of [32, 32, 3]", DTYPES),
    "torch-int64": (lambda: torch.zeros(3, 32, 32, dtype=torch.int64), "got int64 of [3, 32, 32]", DTYPES),
    "torch-8-bit-float": (lambda: torch.zeros(3, 32, 32).to(torch.float8_e4m3fn), "got a tensor of", "expected"),
    "torch-sparse": (lambda: torch.zeros(3, 32, 32).to_sparse(), "got a tensor of", "expected a dense one"),
    "torch-meta": (lambda: torch.zeros(3, 32, 32, device="meta"), "got a tensor of", "expected a dense one"),
    "gray-[H,W]": (lambda: np.zeros((32, 32), np.uint8), "got uint8 of [32, 32]", PIXEL_RANKS),
    "no-dimension": (lambda: np.array(1, np.uint8), "got uint8 of []", PIXEL_RANKS),
    "pixels-of-five-dimensions": (lambda: np.zeros((1, 1, 4, 4, 3), np.uint8), "[1, 1, 4, 4, 3]", PIXEL_RANKS),
    "floats-of-two-dimensions": (lambda: F32[0], "got float32 of [32, 32]", RANKS),
    "floats-of-five-dimensions": (lambda: F32[None, None], "got float32 of [1, 1, 3, 32, 32]", RANKS),
    "list-of-batches": (lambda: [F32[None]], "got float32 of [1, 1, 3, 32, 32]", RANKS),
    "torch-of-two-dimensions": (lambda: torch.zeros(32, 32), "got float32 of [32, 32]", RANKS),
    "floats-of-two-sizes": (lambda: [F32, F32[:, 1:]], "got float32 [3, 31, 32], float32 [3, 32, 32]", ALIKE),
    "floats-of-two-types": (lambda: [F32, F32.astype("f8")], "got float32 [3, 32, 32], float64 [3, 32, 32]", ALIKE),
    "floats-and-pixels": (lambda: [F32, noise(32, 32)], "float32 [3, 32, 32], uint8 [32, 32, 3]", ALIKE),
    "floats-and-files": (lambda: [b"", F32], "got float32 of [3, 32, 32]", IN_A_LIST),
    "two-channels-among-others": (lambda: [noise(9, 9, 2), noise(8, 8)], "got uint8 of [9, 9, 2]", IN_A_LIST),
    "gray-among-others": (lambda: [noise(9, 9)[:, :, 0], noise(8, 8)], "got uint8 of [9, 9]", IN_A_LIST),
    "empty-among-others": (lambda: [noise(0, 9), noise(8, 8)], "got uint8 of [0, 9, 3]", IN_A_LIST),
    "empty-PIL": (lambda: Image.new("RGB", (0, 4)), "got a PIL image of mode RGB, (0, 4)", "empty"),
    "closed-PIL": (closed_image, "got a PIL image of mode RGB, (8, 8)", ""),
}


@pytest.mark.parametrize(("images", "got", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_sent_is_refused_without_a_server_by_saying_what_came(
    nobody: sidelight.Client, images: Callable[[], object], got: str, expected: str
) -> None:
    with pytest.raises(sidelight.InvalidArgument) as caught:
        nobody.attribute(images())
    assert caught.value.message.startswith("images: ")
    assert got in caught.value.message
    assert expected in caught.value.message


SERVER_REFUSED: dict[str, tuple[object, str]] = {
    "floats-of-another-size": (
        np.zeros((3, 31, 32), np.float32),
        r"floating arrays of \[3, 31, 32\], model \"small\" takes \[C, H, W\] = \[3, 32, 32\]",
    ),
    "floats-of-other-channels": (np.zeros((1, 32, 32), np.float32), r"floating arrays of \[1, 32, 32\]"),
    "floats-with-channels-last": (np.zeros((32, 32, 3), np.float32), r"floating arrays of \[32, 32, 3\]"),
    "no-rows": (np.zeros((1, 0, 32, 3), np.uint8), r"\[1, 0, 32, 3\] has a dimension of 0"),
    "no-channels": (np.zeros((2, 0, 32, 32), np.float32), r"\[2, 0, 32, 32\] has a dimension of 0"),
    "pixels-with-channels-first": (np.zeros((3, 32, 32), np.uint8), "32 channels, the model takes 3"),
    "pixels-of-two-channels": (np.zeros((32, 32, 2), np.uint8), "2 channels, the model takes 3"),
}


@pytest.mark.parametrize(("images", "message"), SERVER_REFUSED.values(), ids=SERVER_REFUSED.keys())
def test_a_shape_that_the_model_does_not_take_is_refused_by_saying_what_it_takes(
    client: sidelight.Client, images: np.ndarray, message: str
) -> None:
    with pytest.raises(sidelight.InvalidArgument, match=message):
        client.attribute(images)


@pytest.mark.parametrize("form", [str, Path, lambda path: [path], lambda path: [b"", path]])
def test_a_missing_file_is_a_file_not_found_error(nobody: sidelight.Client, form: Callable[[str], object]) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        nobody.attribute(form("missing.png"))


def test_a_folder_is_no_file(nobody: sidelight.Client, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        nobody.attribute(tmp_path)


@pytest.mark.parametrize("file", [b"", b"no picture", encoded(Image.fromarray(noise(32, 32)))[:500]])
def test_a_file_that_cannot_be_decoded_fails_its_own_example_alone(client: sidelight.Client, file: bytes) -> None:
    good = encoded(Image.fromarray(noise(32, 32)))
    answer = client.attribute([good, file, good], on_error="return")
    assert [(each.example, each.code) for each in answer.failures] == [(1, sidelight.InvalidArgument.code)]
    assert np.isnan(answer.maps[1]).all()
    assert_same(answer.maps[::2], client.attribute([good, good]).maps)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_element_that_is_not_finite_fails_its_own_example_alone(
    client: sidelight.Client, exact: np.ndarray, value: float, dtype: type
) -> None:
    broken = exact.astype(dtype)
    broken[1, 2, 3, 4] = value
    answer = client.attribute(broken, on_error="return")
    assert [(each.example, each.code) for each in answer.failures] == [(1, sidelight.InvalidArgument.code)]
    assert_same(answer.maps[::2], client.attribute(exact).maps[::2])


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


def test_the_picture_of_floats_is_scaled_to_be_seen(client: sidelight.Client, floats: torch.Tensor) -> None:
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
def test_a_range_that_is_none_is_refused_at_the_start(name: str, value: object) -> None:
    with (
        pytest.raises(sidelight_server.ConfigurationError, match=rf"{name}: got .*(, expected two|at most 2 items)"),
        sidelight_server.serve(sidelight_server.ModelSpec(small_cnn(), input_size=(3, 32, 32), **{name: value})),
    ):
        pass


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
