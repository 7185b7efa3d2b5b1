"""Tensors of the protocol: reads elements from raw bytes or typed contents, and packs BYTES."""

import struct
from collections.abc import Iterable, Sequence

import numpy as np
from sidelight.v1 import tensor_pb2

from ...errors import InvalidArgument
from ...wire.requests import MAX_EXAMPLES
from . import inference_pb2 as oip

IMAGE_TYPES: dict[str, tensor_pb2.DataType.ValueType] = {
    "UINT8": tensor_pb2.DATA_TYPE_UINT8,
    "FP16": tensor_pb2.DATA_TYPE_FLOAT16,
    "BF16": tensor_pb2.DATA_TYPE_BFLOAT16,
    "FP32": tensor_pb2.DATA_TYPE_FLOAT32,
    "FP64": tensor_pb2.DATA_TYPE_FLOAT64,
}
FILES = "BYTES"
MAX_UINT8 = 255

_LENGTH = struct.Struct("<I")  # before each element of BYTES
_MORE = 0x80  # set in each byte of a varint but its last


def elements(contents: oip.InferTensorContents, datatype: str, *, field: str) -> memoryview:
    """Return typed contents as the bytes that the same tensor would have as raw contents.

    Raises `InvalidArgument` for a datatype that has none: FP16 and BF16 are always raw.
    """
    match datatype:
        case "UINT8":
            return _uint8(b"".join(contents.uint_contents), field=f"{field}.contents.uint_contents")
        case "FP32":
            return memoryview(b"".join(contents.fp32_contents))
        case "FP64":
            return memoryview(b"".join(contents.fp64_contents))
        case _:
            raise InvalidArgument(f"{field}.contents: {datatype} has no typed contents; send raw_input_contents")


def n_files(shape: Sequence[int], *, field: str) -> int:
    """Return the number of files in a BYTES tensor, [N] or [N, 1]. Raises `InvalidArgument` for any other shape."""
    if len(shape) not in (1, 2) or min(shape) < 0 or list(shape[1:]) not in ([], [1]):
        raise InvalidArgument(f"{field}.shape: {list(shape[:8])}, expected [N] or [N, 1] for BYTES, one file each")
    if shape[0] > MAX_EXAMPLES:
        raise InvalidArgument(f"{field}: {shape[0]} examples, expected at most {MAX_EXAMPLES} in a batch")
    return shape[0]


def unpack_files(data: memoryview, n: int, *, field: str) -> list[bytes]:
    """Return the `n` elements of a BYTES tensor, each after its length as a little-endian uint32."""
    files, at = [], 0
    for index in range(n):
        if len(data) - at < _LENGTH.size:
            raise InvalidArgument(f"{field}: {len(data)} bytes hold {index} elements of BYTES, but shape has {n}")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > len(data) - at:
            raise InvalidArgument(
                f"{field}: element {index} of BYTES has {length} bytes by its length, but {len(data) - at} are left"
            )
        files.append(bytes(data[at : at + length]))
        at += length
    if at != len(data):
        raise InvalidArgument(f"{field}: {len(data)} bytes, expected the {at} of {n} elements of BYTES")
    return files


def pack_bytes(values: Iterable[bytes]) -> bytes:
    """Return the elements of a BYTES tensor, each after its length."""
    return b"".join(piece for value in values for piece in (_LENGTH.pack(len(value)), value))


def _uint8(packed: bytes, *, field: str) -> memoryview:
    """Return packed varints as uint8. Each takes one byte, or two from 128 on."""
    read = np.frombuffer(packed, np.uint8)
    is_last = read < _MORE
    ends = np.flatnonzero(is_last)
    if len(read) and (not is_last[-1] or (~is_last[1:] & ~is_last[:-1]).any()):
        raise InvalidArgument(f"{field}: a number above {MAX_UINT8}, or a truncated one")
    values = read[ends].astype(np.uint16)
    is_long = np.zeros(len(ends), bool)
    is_long[1:] = np.diff(ends) == 2
    is_long[:1] = ends[:1] == 1
    values[is_long] = (values[is_long] << 7) + (read[ends[is_long] - 1] & ~np.uint8(_MORE))
    if (values > MAX_UINT8).any():
        raise InvalidArgument(f"{field}: {values.max()}, expected 0 to {MAX_UINT8}")
    return values.astype(np.uint8).data
