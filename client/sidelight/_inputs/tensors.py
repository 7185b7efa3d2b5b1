"""Tensors: converts arrays and torch tensors to messages and back, without importing torch."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sidelight.v1 import tensor_pb2

from ..exceptions import InvalidArgument
from .validation import summary

Array = NDArray[Any]

DTYPES: dict[str, tensor_pb2.DataType.ValueType] = {
    "uint8": tensor_pb2.DATA_TYPE_UINT8,
    "float16": tensor_pb2.DATA_TYPE_FLOAT16,
    "float32": tensor_pb2.DATA_TYPE_FLOAT32,
    "float64": tensor_pb2.DATA_TYPE_FLOAT64,
}


@runtime_checkable
class TorchTensor(Protocol):
    """The part of `torch.Tensor` that the client uses."""

    dtype: Any

    def detach(self) -> "TorchTensor": ...
    def cpu(self) -> "TorchTensor": ...
    def float(self) -> "TorchTensor": ...
    def numpy(self) -> Array: ...


@runtime_checkable
class ArrayLike(Protocol):
    """Anything that numpy can convert to an array."""

    def __array__(self) -> Array: ...


def host_array(tensor: TorchTensor, field: str) -> Array:
    """Convert a torch tensor to an array on the host; bfloat16 becomes float32."""
    try:
        tensor = tensor.detach().cpu()
        return tensor.float().numpy() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()
    except (RuntimeError, TypeError) as error:  # no numpy equivalent: sparse, meta, 8-bit floats
        raise InvalidArgument(f"{field}: got a tensor of {tensor.dtype}, expected a dense one: {error}") from error


def floats(given: object, field: str, *, expected: str) -> tensor_pb2.Tensor:
    """Convert a floating-point array or tensor to its message."""
    if isinstance(given, TorchTensor):
        array = host_array(given, field)
    elif isinstance(given, ArrayLike):
        array = np.asarray(given)
    else:
        raise InvalidArgument(f"{field}: got {summary(given)}, expected {expected}")
    if array.dtype.kind != "f" or array.dtype.name not in DTYPES:
        raise InvalidArgument(f"{field}: got {array.dtype} of {list(array.shape)}, expected {expected}")
    return tensor_message(array)


def tensor_message(array: Array) -> tensor_pb2.Tensor:
    """Convert an array of one of `DTYPES` to its message."""
    return tensor_pb2.Tensor(dtype=DTYPES[array.dtype.name], shape=array.shape, data=little_endian(array).tobytes())


def little_endian(array: Array) -> Array:
    """Return the array in little-endian byte order, without a copy if it already is."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def array_of(tensor: tensor_pb2.Tensor, data: memoryview | None = None) -> Array:
    """Return a message's elements as a read-only view. `data` replaces the message's bytes, for shared memory."""
    return np.frombuffer(tensor.data if data is None else data, dtype_of(tensor)).reshape(tuple(tensor.shape))


def dtype_of(tensor: tensor_pb2.Tensor) -> np.dtype[Any]:
    """Return the little-endian type of a message's elements."""
    name = next(name for name, number in DTYPES.items() if number == tensor.dtype)
    return np.dtype(name).newbyteorder("<")
