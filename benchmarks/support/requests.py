"""Request messages, for clients that are not the Python client."""

import numpy as np
import sidelight
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2


def request(images: np.ndarray, method: sidelight.methods.Method, id_: str = "") -> pb.AttributeRequest:
    """Return the message that explains pixels, uint8 [N, H, W, C]."""
    tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_UINT8, shape=images.shape, data=images.tobytes())
    target = pb.Target(predicted=pb.PredictedTarget())
    return pb.AttributeRequest(id=id_, images=tensor_pb2.Images(tensor=tensor), target=target, method=method.message())
