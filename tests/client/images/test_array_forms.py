"""Floats and arrays: every form of an array gives the same map, and no input is changed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sidelight
import torch
from PIL import Image

from support.pictures.arrays import assert_same, encoded, noise

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
def test_an_empty_batch_has_no_maps(client: sidelight.Client, nothing: object) -> None:
    answer = client.attribute(nothing)
    assert answer.maps.shape == (0, 32, 32)
    assert len(answer) == len(answer.predictions) == len(answer.targets) == len(answer.geometry) == 0
