"""Outputs: converts an answer to the protocol's tensors."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from google.protobuf.json_format import MessageToDict
from sidelight.v1 import attribution_pb2 as pb
from sidelight.v1 import tensor_pb2

from ...domain import Answer, ExplainedTarget, TopK
from ...errors import Status
from ...wire import responses
from ...wire.tensors import Encoded, encoded
from .tensors import pack_bytes

MAPS, PROBABILITIES, RENDERED = "maps", "probabilities", "rendered"
MAP_TYPES = {
    tensor_pb2.DATA_TYPE_FLOAT32: "FP32",
    tensor_pb2.DATA_TYPE_FLOAT16: "FP16",
    tensor_pb2.DATA_TYPE_UINT8: "UINT8",
}
NO_CLASS = -1  # the class of an example that failed


@dataclass(frozen=True, slots=True)
class Tensor:
    """An output as it is sent."""

    datatype: str
    shape: Sequence[int]
    data: memoryview | bytes


class Outputs:
    """The outputs of one answer, each made on request. The maps are encoded once."""

    def __init__(self, answer: Answer, message: pb.AttributeRequest) -> None:
        self._answer = answer
        self._message = message
        self._maps: Encoded | None = None

    def tensor(self, name: str) -> Tensor:
        """Return one of `OUTPUTS`."""
        return OUTPUTS[name].make(self)

    @property
    def _encoded_maps(self) -> Encoded:
        if self._maps is None:
            self._maps = encoded(self._answer.maps, self._message.output.map_dtype)
        return self._maps

    def _make_maps(self) -> Tensor:
        maps = self._encoded_maps
        return Tensor(MAP_TYPES[maps.dtype], maps.elements.shape, maps.data)

    def _make_scales(self) -> Tensor:
        n_examples = len(self._answer.explanations)
        return _floats(np.array(self._encoded_maps.scales or [1.0] * n_examples), (n_examples,))

    def _make_predicted(self) -> Tensor:
        predicted = [NO_CLASS if each is None else each.predicted for each in self._answer.explanations]
        return _integers(predicted, (len(predicted),))

    def _make_probability(self) -> Tensor:
        probability = [math.nan if each is None else each.probability for each in self._answer.explanations]
        return _floats(np.array(probability), (len(probability),))

    def _make_explained(self) -> Tensor:
        return _integers([NO_CLASS if each is None else each.index for each in self._targets()], self._shape)

    def _make_score(self) -> Tensor:
        scores = [math.nan if each is None else each.score for each in self._targets()]
        return _floats(np.array(scores), self._shape)

    def _make_saturated(self) -> Tensor:
        saturated = np.array([each is not None and each.saturated for each in self._targets()], bool)
        return Tensor("BOOL", self._shape, saturated.tobytes())

    def _make_probabilities(self) -> Tensor:
        probabilities = self._answer.probabilities
        if probabilities is None:  # of no examples
            probabilities = np.zeros((0, 0), np.float32)
        return Tensor("FP32", probabilities.shape, np.ascontiguousarray(probabilities, "<f4").tobytes())

    def _make_failures(self) -> Tensor:
        failures = {each.example: f"{Status(each.code).name}: {each.message}" for each in self._answer.failures}
        n_examples = len(self._answer.explanations)
        return Tensor(
            "BYTES", (n_examples,), pack_bytes(failures.get(index, "").encode() for index in range(n_examples))
        )

    def _make_provenance(self) -> Tensor:
        provenance = pb.Provenance.FromString(responses.provenance(self._answer, self._message))
        text = json.dumps(MessageToDict(provenance, preserving_proto_field_name=True), ensure_ascii=False)
        return Tensor("BYTES", (1,), pack_bytes([text.encode()]))

    def _make_rendered(self) -> Tensor:
        k = math.prod(self._shape[1:])
        pictures = [each or (b"",) * k for each in self._answer.rendered]  # none of an example that failed
        return Tensor("BYTES", self._shape, pack_bytes(picture for each in pictures for picture in each))

    def _targets(self) -> Iterator[ExplainedTarget | None]:
        """Yield the target of each map, in order; None for those of an example that failed."""
        k = self._shape[1] if len(self._shape) == 2 else 1
        for each in self._answer.explanations:
            yield from [None] * k if each is None else each.targets

    @property
    def _shape(self) -> tuple[int, ...]:
        """[N], or [N, k] with k targets."""
        return self._answer.maps.shape[: 2 if isinstance(self._answer.request.target, TopK) else 1]


def _integers(values: Sequence[int], shape: Sequence[int]) -> Tensor:
    return Tensor("INT64", shape, np.array(values, "<i8").tobytes())


def _floats(values: np.ndarray, shape: Sequence[int]) -> Tensor:
    return Tensor("FP64", shape, values.astype("<f8").tobytes())


class _Output(NamedTuple):
    """How an output is made, with its type and shape for a request without parameters."""

    datatype: str
    shape: tuple[str | int, ...]  # of N examples and K classes, with maps of H × W
    make: Callable[[Outputs], Tensor]


OUTPUTS = {
    MAPS: _Output("FP32", ("N", "H", "W"), Outputs._make_maps),
    "scales": _Output("FP64", ("N",), Outputs._make_scales),
    "predicted": _Output("INT64", ("N",), Outputs._make_predicted),
    "probability": _Output("FP64", ("N",), Outputs._make_probability),
    "explained": _Output("INT64", ("N",), Outputs._make_explained),
    "score": _Output("FP64", ("N",), Outputs._make_score),
    "saturated": _Output("BOOL", ("N",), Outputs._make_saturated),
    PROBABILITIES: _Output("FP32", ("N", "K"), Outputs._make_probabilities),
    "failures": _Output("BYTES", ("N",), Outputs._make_failures),
    "provenance": _Output("BYTES", (1,), Outputs._make_provenance),
    RENDERED: _Output("BYTES", ("N",), Outputs._make_rendered),
}
# The outputs of a request that names none: drawing takes time.
DEFAULT = tuple(name for name in OUTPUTS if name != RENDERED)
