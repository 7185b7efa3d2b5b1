"""Responses: encodes an answer as a ModelInferResponse, copying each tensor once."""

import functools
from collections.abc import Sequence

from sidelight._transport.envelope import field

from ...domain import Answer
from ...errors import InvalidArgument, SidelightError
from ...rpc.shared_memory import RegionLookup, Span, span
from ...rpc.validated_request import Encode, ValidatedRequest
from . import inference_pb2 as oip
from .outputs import MAPS, Outputs, Tensor
from .requests import OFFSET, REGION, SIZE, InferRequest, RequestedOutput

_RAW = oip.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_INFER_RESPONSE = oip.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER


def encoder(request: InferRequest, regions: RegionLookup, *, on_stream: bool) -> Encode:
    """Return the function that serializes a request's answer. Raises `NotFound` for an unknown region of an output.

    Outputs in shared memory are written by that function, and the maps among them to `ValidatedRequest.sink`.
    """
    spans = {each.name: _span(each, regions) for each in request.outputs if each.shared and each.name != MAPS}
    return functools.partial(_encode, request.outputs, spans, on_stream)


def failed(request: oip.ModelInferRequest | None, error: SidelightError) -> bytes:
    """Return the serialized response of a stream that carries the failure of one request, or of an unreadable one."""
    response = oip.ModelInferResponse(id=request.id, model_name=request.model_name) if request else None
    message = f"{error.code.name}: {error.message}"
    return oip.ModelStreamInferResponse(error_message=message, infer_response=response).SerializeToString()


def _encode(
    requested: Sequence[RequestedOutput],
    spans: dict[str, Span],
    on_stream: bool,
    answer: Answer,
    validated: ValidatedRequest,
) -> bytes:
    response = oip.ModelInferResponse(
        model_name=answer.provenance.model, model_version=str(answer.provenance.model_version), id=validated.message.id
    )
    outputs, contents = Outputs(answer, validated.message), list[bytes | memoryview]()
    for each in requested:
        tensor = outputs.tensor(each.name)
        described = response.outputs.add(name=each.name, datatype=tensor.datatype, shape=tensor.shape)
        content: bytes | memoryview = tensor.data
        if each.shared:
            sink = validated.sink if each.name == MAPS else spans[each.name]
            assert sink  # noqa: S101  (the message named its region)
            _write(tensor, sink, each)
            described.parameters[REGION].string_param = each.shared.region
            described.parameters[SIZE].int64_param = len(content)
            described.parameters[OFFSET].int64_param = each.shared.offset
            content = b""
        contents.extend(field(_RAW, [content]))
    pieces = [response.SerializeToString(), *contents]
    return b"".join(field(_INFER_RESPONSE, pieces) if on_stream else pieces)


def _write(tensor: Tensor, sink: Span, output: RequestedOutput) -> None:
    if len(tensor.data) > sink.n_bytes:
        raise InvalidArgument(
            f"outputs.{output.name}.parameters.{SIZE}: {sink.n_bytes}, but shape {list(tensor.shape)} of "
            f"{tensor.datatype} needs {len(tensor.data)} bytes"
        )
    Span(sink.region, sink.offset, len(tensor.data), sink.field).write(memoryview(tensor.data))


def _span(output: RequestedOutput, regions: RegionLookup) -> Span:
    shared = output.shared
    assert shared  # noqa: S101
    region = regions.find(shared.region, field=shared.field)
    return span(region, shared.offset, shared.n_bytes, field=shared.field)
