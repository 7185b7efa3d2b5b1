"""Requests with pixels, floats or files, and a server that is checked after each request that it refuses."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import sidelight_server
from PIL import Image
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import attribution_pb2_grpc, tensor_pb2

from support.tolerances import NEIGHBORS

Stub = attribution_pb2_grpc.AttributionServiceStub

TIMEOUT_S = 20.0


def tensor(array: np.ndarray) -> tensor_pb2.Tensor:
    dtype = tensor_pb2.DataType.Value(f"DATA_TYPE_{array.dtype.name.upper()}")
    return tensor_pb2.Tensor(dtype=dtype, shape=array.shape, data=array.tobytes())


def images_of(source: np.ndarray | list[bytes]) -> tensor_pb2.Images:
    if isinstance(source, list):
        return tensor_pb2.Images(encoded=tensor_pb2.EncodedImages(files=source))
    return tensor_pb2.Images(tensor=tensor(source))


def ask(source: np.ndarray | list[bytes], /, **fields: object) -> pb.AttributeRequest:
    """A good request, or one with other fields."""
    good = {
        "images": images_of(source),
        "target": pb.Target(predicted=pb.PredictedTarget()),
        "method": pb.Method(gradient=pb.GradientMethod()),
    }
    return pb.AttributeRequest(**(good | fields))


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def maps_of(response: pb.AttributeResponse) -> np.ndarray:
    maps = response.result.maps
    assert maps.dtype == tensor_pb2.DATA_TYPE_FLOAT32
    return np.frombuffer(maps.data, "<f4").reshape(tuple(maps.shape))


def assert_close(maps: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(maps, expected, rtol=0, atol=NEIGHBORS * np.nanmax(expected))


@dataclass(frozen=True)
class Service:
    """A server, and what it answered before anything went wrong."""

    stub: Stub
    good: pb.AttributeRequest
    maps: np.ndarray

    @classmethod
    def at(cls, channel: grpc.Channel, good: pb.AttributeRequest) -> "Service":
        stub = Stub(channel)
        return cls(stub, good, maps_of(stub.Attribute(good, timeout=TIMEOUT_S)))

    def answer(self, request: pb.AttributeRequest) -> pb.AttributeResponse:
        return self.stub.Attribute(request, timeout=TIMEOUT_S)

    def refuse(self, request: pb.AttributeRequest, code: grpc.StatusCode) -> str:
        """Return why a request was refused, and check that the next good one is answered as before."""
        with pytest.raises(grpc.RpcError) as caught:
            self.stub.Attribute(request, timeout=TIMEOUT_S)
        assert caught.value.code() is code, caught.value.details()
        assert_no_internals(caught.value.details())
        assert_close(maps_of(self.answer(self.good)), self.maps)
        return caught.value.details()


def assert_no_internals(message: str) -> None:
    for secret in ("Traceback", 'File "', str(Path(sidelight_server.__file__).parent), sys.prefix):
        assert secret not in message
