"""Tensors: converts between messages and arrays. Validates everything and copies nothing: arrays are views."""

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ..domain import Array
from ..errors import InvalidArgument
from .enums import named

MAX_ELEMENTS = 2**40  # far above any message, and below the limit of numpy, which applies to empty arrays too
MAX_SIZE = 2**10  # limit of a dimension: four such dimensions have MAX_ELEMENTS elements
LARGEST_HALF_BELOW_1 = 1 - 2**-11  # in float16

DTYPES: dict[tensor_pb2.DataType.ValueType, np.dtype[np.generic]] = {
    tensor_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    tensor_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    tensor_pb2.DATA_TYPE_BFLOAT16: np.dtype("<u2"),  # numpy has no bfloat16: widened to float32 when read
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
MAP_DTYPES = (tensor_pb2.DATA_TYPE_FLOAT32, tensor_pb2.DATA_TYPE_FLOAT16, tensor_pb2.DATA_TYPE_UINT8)


@dataclass(slots=True)
class Layout:
    """The validated type and shape of an array of 3 or 4 dimensions, without its elements."""

    dtype: tensor_pb2.DataType.ValueType
    shape: tuple[int, ...]
    field: str  # of the message, for errors

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def array(self, data: memoryview) -> Array:
        """Return the elements in `data`, which has `n_bytes` bytes, as a view; bfloat16 is widened to float32."""
        self._check_size()
        array: Array = np.frombuffer(data, DTYPES[self.dtype]).reshape(self.shape)
        if self.dtype == tensor_pb2.DATA_TYPE_BFLOAT16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array  # floats within a message may be unaligned, which numpy supports

    def placeholder(self) -> Array:
        """Return an array of this shape and type that takes no memory: one element, broadcast."""
        self._check_size()
        is_wide = self.dtype == tensor_pb2.DATA_TYPE_BFLOAT16
        return np.broadcast_to(np.zeros((), np.float32 if is_wide else DTYPES[self.dtype]), self.shape)

    def _check_size(self) -> None:
        if max(self.shape) > MAX_SIZE and math.prod(max(1, size) for size in self.shape) > MAX_ELEMENTS:
            raise InvalidArgument(f"{self.field}.shape: {list(self.shape)} is too large, even for no examples")


def layout_of(tensor: tensor_pb2.Tensor | tensor_pb2.SharedTensor, *, field: str) -> Layout:
    """Validate a tensor's type and shape. Raises `InvalidArgument`, which names the field."""
    number, shape = tensor.dtype, tensor.shape
    dtype = DTYPES.get(number)
    if dtype is None:
        raise InvalidArgument(f"{field}.dtype: {named(number, tensor_pb2.DataType, DTYPES)}")
    if len(shape) not in (3, 4):  # checked first: the product of a million dimensions takes minutes
        raise InvalidArgument(
            f"{field}.shape: {list(shape[:8])} has {len(shape)} dimensions, expected {letters(dtype)}"
        )
    if min(shape) < 0:
        raise InvalidArgument(f"{field}.shape: {list(shape)}, expected no negative dimension")
    return Layout(number, tuple(shape), field)


def array_of(tensor: tensor_pb2.Tensor, *, field: str, data: memoryview | None = None) -> Array:
    """Return a tensor's elements, of 3 or 4 dimensions, as a view on the message.

    `data` replaces the tensor's own data if the codec cut that out of the message. Raises `InvalidArgument`, which
    names the field, before anything is allocated.
    """
    data = memoryview(tensor.data) if data is None else data  # read once: each access to `tensor.data` copies
    layout = layout_of(tensor, field=field)
    if tensor.scales:
        raise InvalidArgument(f"{field}.scales: {len(tensor.scales)} of them, expected none in a request")
    n_bytes = layout.n_bytes
    if n_bytes != len(data):
        kind = tensor_pb2.DataType.Name(tensor.dtype).removeprefix("DATA_TYPE_").lower()
        raise InvalidArgument(
            f"{field}: shape {list(layout.shape)} has {math.prod(layout.shape)} elements, {kind} needs "
            f"{n_bytes} bytes, data has {len(data)}"
        )
    return layout.array(data)


def floats_of(tensor: tensor_pb2.Tensor, *, field: str) -> NDArray[np.floating]:
    """Return a floating tensor's elements. Raises `InvalidArgument`, which names the field."""
    array = array_of(tensor, field=field)
    if not np.issubdtype(array.dtype, np.floating):
        raise InvalidArgument(f"{field}.dtype: {array.dtype}, expected floats in the model's own input space")
    return cast(NDArray[np.floating], array)


def map_itemsize(output: pb.Output) -> int:
    """Return the bytes per element of the requested maps."""
    return DTYPES[output.map_dtype or tensor_pb2.DATA_TYPE_FLOAT32].itemsize


@dataclass(slots=True)
class Encoded:
    """An array encoded for the wire: elements of type `dtype`, and for each example the value of one unit."""

    dtype: tensor_pb2.DataType.ValueType
    elements: Array
    scales: tuple[float, ...] = ()  # one per entry of the first dimension; empty: 1

    def tensor(self) -> tensor_pb2.Tensor:
        data = self.elements.tobytes()
        return tensor_pb2.Tensor(dtype=self.dtype, shape=self.elements.shape, data=data, scales=self.scales)

    @property
    def data(self) -> memoryview:
        return np.ascontiguousarray(self.elements).reshape(-1).view(np.uint8).data


def encoded(
    array: NDArray[np.float32 | np.float64], dtype: tensor_pb2.DataType.ValueType = tensor_pb2.DATA_TYPE_FLOAT32
) -> Encoded:
    """Encode an array in one of `MAP_DTYPES`."""
    if dtype == tensor_pb2.DATA_TYPE_UINT8:
        return _quantize(array)
    if dtype == tensor_pb2.DATA_TYPE_FLOAT16:
        return _halve(array)
    return Encoded(dtype, array.astype(DTYPES[dtype], copy=False))


def _quantize(array: NDArray[np.float32 | np.float64]) -> Encoded:
    """Quantize a non-negative array to uint8, with each example's largest element as 255."""
    finite = np.nan_to_num(array, nan=0.0)
    scales = _largest(finite) / 255  # [N]
    scales[scales == 0] = 1.0
    return Encoded(tensor_pb2.DATA_TYPE_UINT8, np.rint(finite / _along(scales, array)).astype(np.uint8), tuple(scales))


def _halve(array: NDArray[np.float32 | np.float64]) -> Encoded:
    """Convert an array to float16, scaled so that each example's largest element is below 1.

    Gradients may be smaller than float16 can hold. The scale is a power of two, so scaling loses no digits.
    """
    largest = _largest(np.nan_to_num(np.abs(array), nan=0.0))  # [N]
    # Not `ldexp(1.0, …)`: numpy 1 would compute that in float16.
    scales = np.ldexp(np.ones_like(largest), np.frexp(largest)[1])
    # Keep it below 1 after rounding too: otherwise a product of 2¹²⁸ would overflow the caller's float32.
    shares = np.clip(array / _along(scales, array), -LARGEST_HALF_BELOW_1, LARGEST_HALF_BELOW_1)
    return Encoded(tensor_pb2.DATA_TYPE_FLOAT16, shares.astype("<f2"), tuple(scales))


def _largest(array: NDArray[np.float32 | np.float64]) -> NDArray[np.float64]:
    """Return each example's largest element, [N], of a non-negative array."""
    largest: NDArray[np.float64] = array.max(axis=tuple(range(1, array.ndim)), initial=0).astype(np.float64)
    return largest


def _along(scales: NDArray[np.float64], array: Array) -> NDArray[np.float64]:
    return scales.reshape(-1, *[1] * (array.ndim - 1))


def letters(dtype: np.dtype[np.generic]) -> str:
    """Return the allowed shapes of arrays of this type, for error messages."""
    return "[N, H, W, C] or [H, W, C] for uint8" if dtype == np.uint8 else "[N, C, H, W] or [C, H, W] for floats"
