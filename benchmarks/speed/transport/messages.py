"""The messages and their sizes."""

from typing import NamedTuple

import numpy as np
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

RESULT_TAG = 0x12  # the field of AttributeStreamResponse after the id


class Case(NamedTuple):
    """Messages of one size."""

    name: str
    shape: tuple[int, int, int, int]  # of the images and, without channel reduction, of the maps; float32
    n: int  # messages of a round
    window: int
    goal: float

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * 4


CASES = (
    Case("1 kB", (1, 3, 9, 9), 3000, 32, 0.45),
    Case("150 kB", (1, 3, 112, 112), 800, 32, 0.5),
    Case("600 kB", (1, 3, 224, 224), 300, 16, 0.6),
    Case("4.8 MB", (8, 3, 224, 224), 60, 8, 0.85),
)


def check_answer(response: bytes) -> bytes:
    """Return the id of an answer, which must be a result."""
    end = 2 + response[1]
    assert response[end] == RESULT_TAG, pb.AttributeStreamResponse.FromString(response).failure
    return response[2:end]


def attribute(case: Case, id_: str) -> bytes:
    data = np.random.default_rng(0).standard_normal(case.shape).astype(np.float32).tobytes()
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=case.shape, data=data)
    return _asking(id_, tensor_pb2.Images(tensor=tensor), pb.Output())


def attribute_slot(case: Case, region: str, slot: int, slot_bytes: int) -> bytes:
    at = slot * slot_bytes
    images = tensor_pb2.SharedTensor(
        region=region, offset_bytes=at, dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=case.shape
    )
    output = pb.Output(region=tensor_pb2.SharedTensor(region=region, offset_bytes=at + case.n_bytes))
    return _asking(str(slot), tensor_pb2.Images(shared=images), output)


def _asking(id_: str, images: tensor_pb2.Images, output: pb.Output) -> bytes:
    request = pb.AttributeRequest(
        id=id_,
        images=images,
        target=pb.Target(predicted=pb.PredictedTarget()),
        method=pb.Method(gradient=pb.GradientMethod()),
        channels=pb.CHANNEL_REDUCTION_NONE,
        output=output,
    )
    return pb.AttributeStreamRequest(attribute=request).SerializeToString()


def registration(region: str, size: int) -> bytes:
    request = pb.RegisterRegionRequest(id="region", region=region, size_bytes=size)
    return pb.AttributeStreamRequest(register_region=request).SerializeToString()
