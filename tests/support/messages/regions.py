"""Files of shared memory, and requests whose images and maps lie in them."""

import contextlib
import os
from pathlib import Path

import numpy as np
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from support.messages.conversation import Conversation

FAILED_PRECONDITION, RESOURCE_EXHAUSTED, DATA_LOSS = 9, 8, 15
SIZE = 64 * 1024


def make(path: Path, *, size: int = SIZE) -> Path:
    """Make a file whose blocks are all allocated."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return path


def register(region: str, size: int = SIZE, *, id_: str = "region") -> pb.AttributeStreamRequest:
    return pb.AttributeStreamRequest(register_region=pb.RegisterRegionRequest(id=id_, region=region, size_bytes=size))


def lying(images: np.ndarray, region: str = "a", *, offset: int = 0) -> tensor_pb2.Images:
    dtype = tensor_pb2.DataType.Value(f"DATA_TYPE_{images.dtype.name.upper()}")
    return tensor_pb2.Images(
        shared=tensor_pb2.SharedTensor(region=region, offset_bytes=offset, dtype=dtype, shape=images.shape)
    )


def into(region: str = "a", *, offset: int = 0, **output: object) -> pb.Output:
    return pb.Output(region=tensor_pb2.SharedTensor(region=region, offset_bytes=offset), **output)


def put(path: Path, images: np.ndarray, *, offset: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(images.tobytes())


def take(path: Path, shape: tuple[int, ...], *, offset: int = 0, dtype: str = "<f4") -> np.ndarray:
    count = int(np.prod(shape))
    return np.fromfile(path, dtype, count, offset=offset).reshape(shape)


def opened(stream: Conversation, *regions: str) -> None:
    for region in regions:
        stream.send(register(region))
        answer = stream.receive()
        assert answer.region_registered.region == region, answer
        assert answer.id == "region"


def files_of(folder: Path) -> int:
    """Count the open descriptors of files in a folder, deleted files included."""
    targets = []
    for each in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{each}"))
    return sum(target.startswith(f"{folder}/") for target in targets)
