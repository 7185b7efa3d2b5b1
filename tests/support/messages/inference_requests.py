"""Requests of the Open Inference Protocol for the two models of its tests."""

import io

import numpy as np
from PIL import Image
from sidelight_server.interop.open_inference import inference_pb2 as oip

from support.messages.attribution import floats
from support.messages.inference import call, infer_request, tensors_of
from support.servers.running import Running

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), np.uint8)


def infer(server: Running, request: oip.ModelInferRequest) -> dict[str, np.ndarray]:
    return tensors_of(call(server.channel, "ModelInfer", request))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def packed(*files: bytes) -> bytes:
    return b"".join(len(each).to_bytes(4, "little") + each for each in files)


def files_request(n: int, **fields: object) -> oip.ModelInferRequest:
    image = oip.ModelInferRequest.InferInputTensor(name="images", datatype="BYTES", shape=[n])
    return oip.ModelInferRequest(**{"model_name": "small", "inputs": [image]} | fields)


def good(**fields: object) -> oip.ModelInferRequest:
    return infer_request(floats(1), **fields)
