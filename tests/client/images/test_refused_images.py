"""Images that are refused, by the client or by the server, and files that fail alone."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sidelight
import torch
from PIL import Image

from support.pictures.arrays import assert_same, encoded, noise


@pytest.fixture
def nobody() -> Iterator[sidelight.Client]:
    """A client without a server: it rejects these inputs before it sends anything."""
    with sidelight.connect("unix:/nonexistent/socket", connect_timeout=0) as client:
        yield client


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
