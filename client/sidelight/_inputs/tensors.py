"""Tensors: arrays of any kind become messages. A torch tensor counts as an array; torch is never imported."""

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
    """What of a torch tensor is used here."""

    dtype: Any

    def detach(self) -> "TorchTensor":
        """Leave the graph."""

    def cpu(self) -> "TorchTensor":
        """Come to the host."""

    def float(self) -> "TorchTensor":
        """Become float32."""

    def numpy(self) -> Array:
        """Become an array."""


@runtime_checkable
class ArrayLike(Protocol):
    """Anything that numpy can make an array of."""

    def __array__(self) -> Array: ...


def host_array(tensor: TorchTensor, field: str) -> Array:
    """Return a torch tensor's elements, bfloat16 widened."""
    try:
        tensor = tensor.detach().cpu()
        return tensor.float().numpy() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy()
    except (RuntimeError, TypeError) as error:  # sparse, meta, 8-bit floats: what numpy has no word for
        raise InvalidArgument(f"{field}: got a tensor of {tensor.dtype}, expected a dense one: {error}") from error


def floats(given: object, field: str, *, expected: str) -> tensor_pb2.Tensor:
    """Return the message of an array of floating numbers."""
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
    """Return the message of an array whose type is one of `DTYPES`."""
    return tensor_pb2.Tensor(dtype=DTYPES[array.dtype.name], shape=array.shape, data=little_endian(array).tobytes())


def little_endian(array: Array) -> Array:
    """Return an array whose bytes are in the order of the wire: itself, on most machines."""
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def array_of(tensor: tensor_pb2.Tensor, data: memoryview | None = None) -> Array:
    """Return a message's elements as they are, as a read-only view. `data` stands for bytes that it leaves out."""
    return np.frombuffer(tensor.data if data is None else data, dtype_of(tensor)).reshape(tuple(tensor.shape))


def dtype_of(tensor: tensor_pb2.Tensor) -> np.dtype[Any]:
    """Return the type of a message's elements, in the order of the wire."""
    name = next(name for name, number in DTYPES.items() if number == tensor.dtype)
    return np.dtype(name).newbyteorder("<")
