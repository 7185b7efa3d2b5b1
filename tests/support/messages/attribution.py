"""Messages for the tests of the service: requests, and the contents of their answers."""

import numpy as np
import torch
from google.protobuf.duration_pb2 import Duration
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from support.models import Linear
from support.tolerances import CLOSED_FORM

CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = 1, 3, 4, 5
RESOURCE_EXHAUSTED, FAILED_PRECONDITION, UNIMPLEMENTED = 8, 9, 12


BRIEF = Duration(nanos=100_000_000)


def ask(images: np.ndarray, /, **fields: object) -> pb.AttributeRequest:
    dtype = tensor_pb2.DataType.Value(f"DATA_TYPE_{images.dtype.name.upper()}")
    good = {
        "images": tensor_pb2.Images(
            tensor=tensor_pb2.Tensor(dtype=dtype, shape=images.shape, data=images.tobytes()),
        ),
        "target": pb.Target(predicted=pb.PredictedTarget()),
        "method": pb.Method(gradient=pb.GradientMethod()),
    }
    return pb.AttributeRequest(**(good | fields))


def floats(n: int, *, shape: tuple[int, int, int] = (3, 4, 5), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, *shape)).astype(np.float32)


def linear_maps(x: np.ndarray) -> np.ndarray:
    """The closed form: softmax of a linear model, map = max over channels of |p_k (w_k − Σ_j p_j w_j)|."""
    weight, bias = (each.detach().double() for each in Linear().linear.parameters())
    inputs = torch.from_numpy(x).double().flatten(1)  # [n, C·H·W]
    p = (inputs @ weight.T + bias).softmax(dim=1)  # [n, K]
    largest, k = p.max(dim=1)
    gradients = largest[:, None] * (weight[k] - p @ weight)  # [n, C·H·W]
    return gradients.view(x.shape).abs().amax(dim=1).numpy()


DOCUMENTED = {
    CANCELLED,
    INVALID_ARGUMENT,
    DEADLINE_EXCEEDED,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    FAILED_PRECONDITION,
    UNIMPLEMENTED,
}


def attribute(id_: str, images: np.ndarray, /, **fields: object) -> pb.AttributeStreamRequest:
    return pb.AttributeStreamRequest(attribute=ask(images, id=id_, **fields))


def cancel(id_: str) -> pb.AttributeStreamRequest:
    return pb.AttributeStreamRequest(cancel=pb.CancelRequest(id=id_))


def maps_of(response: pb.AttributeResponse | pb.AttributeStreamResponse) -> np.ndarray:
    if isinstance(response, pb.AttributeStreamResponse):
        assert response.WhichOneof("outcome") == "result", response.failure
    return np.frombuffer(response.result.maps.data, "<f4").reshape(tuple(response.result.maps.shape))


def code_of(response: pb.AttributeStreamResponse) -> int:
    assert response.WhichOneof("outcome") == "failure"
    assert response.failure.message
    return response.failure.code


def assert_explains(response: pb.AttributeStreamResponse, images: np.ndarray) -> None:
    # float32 against the closed form in float64.
    np.testing.assert_allclose(maps_of(response), linear_maps(images), **CLOSED_FORM)


LARGE = floats(512)  # whose maps, all channels of them, take 120 kB
