"""Tensors on the wire: bytes become arrays, as views, and arrays become bytes. Nothing is trusted, nothing copied."""

import math
from typing import cast

import numpy as np
from numpy.typing import NDArray
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from .attribution import Array
from .enums import named
from .errors import InvalidArgument

MAX_ELEMENTS = 2**40  # far beyond any message, and below what numpy refuses as the shape of even an empty array
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)

DTYPES: dict[tensor_pb2.DataType.ValueType, np.dtype[np.generic]] = {
    tensor_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    tensor_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2"),  # numpy has no such type: widened once it is read
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
MAP_DTYPES = (tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT16, tensor_pb2.DATA_TYPE_UINT8)


def array_of(tensor: tensor_pb2.Tensor, *, field: str) -> Array:
    """Return a tensor's elements, of 3 or 4 dimensions, as a view on the message.

    `InvalidArgument` names the field. Nothing is allocated before lengths agree.
    """
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidArgument(f"{field}.dtype: {named(tensor.dtype, tensor_pb2.DataType, DTYPES)}")
    if len(tensor.shape) not in (3, 4):  # first of all: the product of a million dimensions takes minutes
        raise InvalidArgument(
            f"{field}.shape: {list(tensor.shape[:8])} has {len(tensor.shape)} dimensions, expected {letters(dtype)}"
        )
    shape = list(tensor.shape)
    if any(size < 0 for size in shape):
        raise InvalidArgument(f"{field}.shape: {shape}, expected no negative dimension")
    if tensor.scale:
        raise InvalidArgument(f"{field}.scale: {tensor.scale}, expected it unset in a request")
    n_elements = math.prod(shape)
    expected = n_elements * dtype.itemsize
    if expected != len(tensor.data):
        kind = tensor_pb2.DataType.Name(tensor.dtype).removeprefix("DATA_TYPE_").lower()
        raise InvalidArgument(
            f"{field}: shape {shape} has {n_elements} elements, {kind} needs {expected} bytes, "
            f"data has {len(tensor.data)}"
        )
    if math.prod(max(1, size) for size in shape) > MAX_ELEMENTS:
        raise InvalidArgument(f"{field}.shape: {shape} is too large, even for no examples")
    array: Array = np.frombuffer(tensor.data, dtype).reshape(shape)
    if tensor.dtype == tensor_pb2.DATA_TYPE_BFLOAT16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array


def floats_of(tensor: tensor_pb2.Tensor, *, field: str) -> NDArray[np.floating]:
    """Return a floating tensor's elements. `InvalidArgument` names the field."""
    array = array_of(tensor, field=field)
    if not np.issubdtype(array.dtype, np.floating):
        raise InvalidArgument(f"{field}.dtype: {array.dtype}, expected floats in the model's own input space")
    return cast(NDArray[np.floating], array)


def map_itemsize(output: pb.Output) -> int:
    """Return how many bytes an element of the wanted maps takes."""
    return DTYPES[output.map_dtype or tensor_pb2.DATA_TYPE_FLOAT32].itemsize


def tensor_of(
    array: NDArray[np.float32], dtype: tensor_pb2.DataType.ValueType = tensor_pb2.DATA_TYPE_FLOAT32
) -> tensor_pb2.Tensor:
    """Return the message of a float32 array, in one of `MAP_DTYPES`."""
    if dtype == tensor_pb2.DATA_TYPE_UINT8:
        return _quantised(array)
    if dtype == tensor_pb2.DATA_TYPE_FLOAT16:
        return _halved(array)
    return tensor_pb2.Tensor(dtype=dtype, shape=array.shape, data=array.astype(DTYPES[dtype], copy=False).tobytes())


def _quantised(array: NDArray[np.float32]) -> tensor_pb2.Tensor:
    """Return an array without sign in bytes, the largest element as 255."""
    finite = np.nan_to_num(array, nan=0.0)
    scale = _largest(finite) / 255 or 1.0
    data = np.rint(finite / np.float64(scale)).astype(np.uint8).tobytes()
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_UINT8, shape=array.shape, data=data, scale=scale)


def _halved(array: NDArray[np.float32]) -> tensor_pb2.Tensor:
    """Return an array in float16, the largest element near 1: gradients may be less than float16 can hold.

    The scale is a power of two, so that nothing is lost by it.
    """
    scale = 2.0 ** math.frexp(_largest(np.nan_to_num(np.abs(array), nan=0.0)))[1]
    data = (array / np.float64(scale)).astype("<f2").tobytes()
    return tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT16, shape=array.shape, data=data, scale=scale)


def _largest(array: NDArray[np.float32]) -> float:
    """Return the largest element; 0 where that is less than a normal number, for it has hardly a digit left."""
    largest = float(array.max(initial=0))
    return largest if largest >= SMALLEST_NORMAL else 0.0


def letters(dtype: np.dtype[np.generic]) -> str:
    """Return the shapes that an array of pixels or of floats may have."""
    return "[N, H, W, C] or [H, W, C] for uint8" if dtype == np.uint8 else "[N, C, H, W] or [C, H, W] for floats"
