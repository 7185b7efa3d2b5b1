"""Rows: the columns that the explainer adds to a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sidelight.v1 import tensor_pb2

from ..domain import Answer, Convergence, Explanation
from ..errors import Status
from ..wire.tensors import encoded

Columns = dict[str, NDArray[Any]]
Map = NDArray[np.float32 | np.float64]
NO_CLASS = -1


@dataclass(frozen=True, slots=True)
class Row:
    """The results of one example. Without a map, `failure` has the reason."""

    failure: str = ""
    map: Map | None = None
    explanation: Explanation | None = None
    label: str = ""  # of the predicted class
    provenance: str = ""  # digest of the provenance
    digest: str = ""  # of the example


def row_of(answer: Answer, index: int, *, provenance: str) -> Row:
    """Return the row of one example of an answer."""
    explanation = answer.explanations[index]
    if explanation is None:
        failure = next(each for each in answer.failures if each.example == index)
        return Row(failure_text(failure.code, failure.message), provenance=provenance)
    known = explanation.predicted < len(answer.labels)
    label = answer.labels[explanation.predicted] if known else ""
    return Row("", answer.maps[index], explanation, label, provenance)


def failure_text(code: int, message: str) -> str:
    """Return a failure as text: the name of its status and its message."""
    return f"{Status(code).name}: {message}"


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape and type of the columns: of one map, and of one row's targets, which is () or (k,)."""

    map_shape: tuple[int, ...]
    map_dtype: tensor_pb2.DataType.ValueType
    targets_shape: tuple[int, ...]

    def columns(self, rows: Sequence[Row]) -> Columns:
        """Return the columns of these rows. Without a map they hold NaN (0 in uint8), -1 and the empty string."""
        return {
            **self._maps(rows),
            "predicted": np.array([each.explanation.predicted if each.explanation else NO_CLASS for each in rows]),
            "predicted_label": _texts([each.label for each in rows]),
            "probability": _floats([each.explanation.probability if each.explanation else None for each in rows]),
            "target": self._of_targets(
                rows, lambda explanation: [each.index for each in explanation.targets], NO_CLASS
            ),
            "score": self._of_targets(rows, lambda explanation: [each.score for each in explanation.targets], np.nan),
            "convergence_error": _errors(rows, lambda convergence: convergence.error),
            "completeness_error": _errors(rows, lambda convergence: convergence.relative_completeness_error),
            "failure": _texts([each.failure for each in rows]),
            "example_digest": _texts([each.digest for each in rows]),
            "provenance": _texts([each.provenance for each in rows]),
        }

    def _maps(self, rows: Sequence[Row]) -> Columns:
        shape = next((each.map.shape for each in rows if each.map is not None), self.map_shape)
        missing: Map = np.full(shape, np.nan, np.float32)
        coded = [encoded((missing if each.map is None else each.map)[None], self.map_dtype) for each in rows]
        maps = {"map": _stack([each.elements[0] for each in coded])}
        if self.map_dtype == tensor_pb2.DATA_TYPE_FLOAT32:
            return maps
        scales = [each.scales[0] if row.map is not None else None for each, row in zip(coded, rows, strict=True)]
        return maps | {"map_scale": _floats(scales)}

    def _of_targets(self, rows: Sequence[Row], of: Callable[[Explanation], list[Any]], missing: float) -> NDArray[Any]:
        none = [missing] * int(np.prod(self.targets_shape))
        values = np.array([of(each.explanation) if each.explanation else none for each in rows])
        return values.reshape(len(rows), *self.targets_shape)


def _errors(rows: Sequence[Row], of: Callable[[Convergence], float | None]) -> NDArray[np.float32]:
    convergences = [each.explanation.convergence if each.explanation else None for each in rows]
    return _floats([of(each) if each else None for each in convergences])


def _floats(values: Sequence[float | None]) -> NDArray[np.float32]:
    return np.array([np.nan if each is None else each for each in values], np.float32)


def _texts(values: Sequence[str]) -> NDArray[Any]:
    return np.array(values, object)


def _stack(maps: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return maps of one shape as an array [N, …], maps of several shapes as an array of arrays."""
    if len({each.shape for each in maps}) == 1:
        return np.stack(maps)
    ragged = np.empty(len(maps), object)
    ragged[:] = list(maps)
    return ragged
