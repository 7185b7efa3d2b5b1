"""Messages of the Open Inference Protocol for tests: requests, and the tensors of an answer."""

from collections.abc import Iterable, Mapping
from typing import Any

import grpc
import numpy as np
from sidelight_server.interop.open_inference import inference_pb2 as oip
from sidelight_server.interop.open_inference.tensors import unpack_files

from support.servers.running import TIMEOUT_S

SERVICE = "/inference.GRPCInferenceService/"
DATATYPES = {"uint8": "UINT8", "float16": "FP16", "float32": "FP32", "float64": "FP64"}
DTYPES = {"UINT8": "u1", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "BOOL": "?"}


def parameter(value: object) -> oip.InferParameter:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return oip.InferParameter(**{kinds[type(value)]: value})


def tensor(images: np.ndarray, **parameters: object) -> oip.ModelInferRequest.InferInputTensor:
    return oip.ModelInferRequest.InferInputTensor(
        name="images",
        datatype=DATATYPES[images.dtype.name],
        shape=images.shape,
        parameters={name: parameter(value) for name, value in parameters.items()},
    )


def wanted(name: str, **parameters: object) -> oip.ModelInferRequest.InferRequestedOutputTensor:
    return oip.ModelInferRequest.InferRequestedOutputTensor(
        name=name, parameters={key: parameter(value) for key, value in parameters.items()}
    )


def infer_request(
    images: np.ndarray, *, outputs: Iterable[Any] = (), parameters: Mapping[str, object] | None = None, **fields: object
) -> oip.ModelInferRequest:
    """A request with its images as raw contents."""
    good = {
        "inputs": [tensor(images)],
        "raw_input_contents": [images.tobytes()],
        "outputs": [wanted(each) if isinstance(each, str) else each for each in outputs],
        "parameters": {name: parameter(value) for name, value in (parameters or {}).items()},
    }
    return oip.ModelInferRequest(**(good | fields))


def call(channel: grpc.Channel, name: str, request: Any, **options: Any) -> Any:
    """Make a unary call."""
    answer = getattr(oip, type(request).__name__.removesuffix("Request") + "Response")
    method = channel.unary_unary(
        SERVICE + name, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
    )
    return method(request, **{"timeout": TIMEOUT_S} | options)


def stream(channel: grpc.Channel, requests: Iterable[oip.ModelInferRequest], **options: Any) -> Any:
    """Open a stream; it yields the responses."""
    method = channel.stream_stream(
        SERVICE + "ModelStreamInfer",
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelStreamInferResponse.FromString,
    )
    return method(iter(requests), **{"timeout": TIMEOUT_S} | options)


def tensors_of(response: oip.ModelInferResponse) -> dict[str, np.ndarray]:
    """The outputs as arrays; those in shared memory are empty."""
    assert len(response.outputs) == len(response.raw_output_contents)
    return {
        each.name: _array(each, raw)
        for each, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        if "shared_memory_region" not in each.parameters
    }


def _array(output: oip.ModelInferResponse.InferOutputTensor, raw: bytes) -> np.ndarray:
    if output.datatype == "BYTES":
        return np.array(unpack_files(memoryview(raw), output.shape[0], field=output.name), object)
    return np.frombuffer(raw, DTYPES[output.datatype]).reshape(output.shape)
