"""Reads the message of an answer."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from .._inputs.enums import word
from .._inputs.images import EncodedBatch
from .._inputs.tensors import Array, array_of
from .attribution import Attribution
from .types import Convergence, ExplainedTarget, Failure, Geometry, Prediction, Timing


def read_answer(
    message: pb.Attribution,
    batch: EncodedBatch,
    *,
    index: int = 0,
    baseline: Array | None = None,
    maps: Array | None = None,
) -> Attribution:
    """Convert a response message to an `Attribution`.

    `batch` and `baseline` are those of the request. `maps` has the maps in their wire type, if sent in shared memory.
    """
    failed = {failure.example for failure in message.failures}
    # None for examples that failed, or that have no map yet in an answer that is not final.
    examples = [
        each if each.HasField("prediction") and i not in failed else None for i, each in enumerate(message.examples)
    ]
    top_k = message.provenance.target.WhichOneof("target") == "top_k"
    return Attribution(
        maps=_maps(
            message.maps, array_of(message.maps) if maps is None else maps, [each is not None for each in examples]
        ),
        predictions=tuple(each and Prediction.of(each) for each in examples),
        targets=tuple(each and _targets(each.targets, top_k=top_k) for each in examples),
        geometry=tuple(Geometry.of(each.geometry) if each and each.HasField("geometry") else None for each in examples),
        convergence=tuple(
            Convergence.of(each.convergence) if each and each.HasField("convergence") else None for each in examples
        ),
        failures=tuple(Failure(each.example, each.code, each.message) for each in message.failures),
        probabilities=array_of(message.probabilities) if message.HasField("probabilities") else None,
        timing=Timing.of(message.timing),
        map_dtype=word(tensor_pb2.DataType, message.maps.dtype),
        transport=word(pb.Transport, message.transport),
        final=message.final,
        index=index,
        id=batch.id or "",
        names=batch.names,
        _batch=batch,
        _provenance=message.provenance,
        _baseline=baseline,
    )


def _maps(tensor: tensor_pb2.Tensor, array: Array, have_maps: list[bool]) -> NDArray[np.float32]:
    if array.dtype == np.float32:
        return array  # a read-only view of the message, without a copy
    maps = array.astype(np.float32)
    for i, scale in enumerate(tensor.scales):
        maps[i] = np.multiply(array[i], scale, dtype=np.float64)  # a scale may be below the range of float32
    if tensor.dtype == tensor_pb2.DATA_TYPE_UINT8:  # it has no NaN: the server sends zeros for a missing map
        maps[~np.array(have_maps, bool)] = np.nan
    return maps


def _targets(messages: Sequence[pb.ExplainedTarget], *, top_k: bool) -> ExplainedTarget | tuple[ExplainedTarget, ...]:
    return tuple(map(ExplainedTarget.of, messages)) if top_k else ExplainedTarget.of(messages[0])
