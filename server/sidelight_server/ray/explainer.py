"""The explainer: a class for `Dataset.map_batches` that explains the images of each batch with an engine."""

import asyncio
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.json_format import MessageToDict
from numpy.typing import NDArray
from sidelight._inputs.enums import Channels, MapDtype, Score
from sidelight._inputs.targets import Target
from sidelight._options import FOR_EVER_S, AttributeOptions
from sidelight.methods.method import Method
from sidelight.methods.parsing import parse_method
from sidelight.v1 import attribution_pb2 as pb
from torch import nn

from ..config.spec import ModelSpec
from ..domain import Answer, Array, Choice, Files, PerExample, TopK
from ..errors import ConfigurationError, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from ..wire import requests, responses
from .engines import BlockingEngine, assigned_engine
from .examples import Example, batches, digest_of, example_of
from .rows import Columns, Layout, Row, failure_text, row_of

COLUMNS = ("image", "bytes", "path")  # default columns for images, in order of preference
OF_THE_REQUEST = (InvalidArgument, NotFound, FailedPrecondition, Unimplemented)  # errors that a retry does not change


class Explainer:
    """Explains the images of each batch, and adds columns with their maps. Thread-safe.

        ds.map_batches(Explainer, fn_constructor_kwargs={"model": "hf:DIR", "method": "gradient"}, batch_size=64,
                       compute=ray.data.ActorPoolStrategy(size=2, enable_true_multi_threading=True), num_gpus=1)

    `model` is a source, as of `sidelight-server --model`, a module or a `ModelSpec`. `method` is an object of
    `sidelight` or its text; `target`, `score`, `channels` and `map_dtype` are those of `Client.attribute`. The images
    are in `column`, by default the first of "image", "bytes" and "path" that there is: arrays, encoded files, or paths
    that the actor can read. `target_column` has the class of each row, by index or label. `provenance` is a folder to
    which each provenance is written as a file named by its digest. `settings` are fields of `Settings`; `threads`
    defaults to the CPUs that Ray has assigned to the actor.

    Added columns, of N rows: `map` [N, H, W] with NaN if the row failed, `map_scale` for a smaller `map_dtype`,
    `predicted`, `predicted_label`, `probability`, `target` and `score` ([N, k] for `TopK(k)`), `convergence_error`,
    `completeness_error`, `failure` (empty if there is none), `example_digest` and `provenance`.

    Raises `ConfigurationError` for a model or setting, and `InvalidArgument` or another `SidelightError` for options
    that the model cannot serve. An image that fails never raises: its row has a `failure`.
    """

    def __init__(
        self,
        *,
        model: nn.Module | ModelSpec | str,
        method: Method | str = "gradient",
        target: Target = None,
        score: Score = "probability",
        channels: Channels = "max_abs",
        map_dtype: MapDtype = "float32",
        column: str | None = None,
        target_column: str | None = None,
        provenance: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        self._message = AttributeOptions(
            model=None,
            target=target,
            method=parse_method(method) if isinstance(method, str) else method,
            score=score,
            channels=channels,
            probabilities=False,
            timeout=FOR_EVER_S,
            map_dtype=map_dtype,
        ).template()
        self._message.images.encoded.SetInParent()  # no files: the rest is the same in every batch's request
        self._request = requests.parse(self._message)
        self._column, self._target_column = column, target_column
        self._folder = None if provenance is None else Path(provenance)
        self._provenances: dict[object, str] = {}
        self._blocking = BlockingEngine(assigned_engine(model, settings, "Explainer()"))
        self._engine = self._blocking.engine
        self._layout = self._blocking.wait(self._check_options())

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> Columns:
        """Return the batch with the columns added. `batch` has the format "numpy", Ray's default."""
        images = list(batch[self._column_of(batch)])
        targets = [] if self._target_column is None else batch[self._target_column].tolist()
        rows = self._blocking.wait(self._rows(images, targets))
        return {**batch, **self._layout.columns(rows)}

    def _column_of(self, batch: Mapping[str, NDArray[Any]]) -> str:
        column = self._column or next((each for each in COLUMNS if each in batch), COLUMNS[0])
        for each in filter(None, (column, self._target_column)):
            if each not in batch:
                raise ConfigurationError(f'column: no "{each}" in the data set, whose columns are {", ".join(batch)}')
        return column

    async def _check_options(self) -> Layout:
        """Check the options by explaining an empty batch, whose answer has the shape of the maps."""
        model = self._engine.model("")
        none: Files | Array = (
            Files(()) if model.preprocessing else np.zeros((0, *(model.trial_shape or (1, 1, 1))), "f4")
        )
        answer = await self._engine.attribute(dataclasses.replace(self._request, images=none))
        self.facts = self._facts_of(answer)  # the provenance of what it computes, as a JSON object
        self._provenance_of(answer)
        target = self._request.target
        return Layout(
            map_shape=answer.maps.shape[1:],
            map_dtype=self._message.output.map_dtype,
            targets_shape=(target.k,) if isinstance(target, TopK) else (),
        )

    async def _rows(self, images: Sequence[object], targets: Sequence[Choice]) -> list[Row]:
        rows = [Row()] * len(images)
        examples: dict[int, Example] = {}
        for index, outcome in enumerate(await asyncio.to_thread(lambda: list(map(_read, images)))):
            if isinstance(outcome, Row):
                rows[index] = outcome
            else:
                examples[index] = outcome
        explained = (self._explain(indices, each, targets) for indices, each in batches(examples))
        for found in await asyncio.gather(*explained):
            for index, row in found.items():
                rows[index] = dataclasses.replace(row, digest=digest_of(examples[index]))
        return rows

    async def _explain(
        self, indices: Sequence[int], images: Files | Array, targets: Sequence[Choice]
    ) -> dict[int, Row]:
        """Return the rows of one request. If it is rejected as a whole, each of its images is tried alone."""
        target = PerExample(tuple(targets[each] for each in indices)) if targets else self._request.target
        try:
            answer = await self._engine.attribute(dataclasses.replace(self._request, images=images, target=target))
        except OF_THE_REQUEST as error:
            if len(indices) == 1:
                return {indices[0]: Row(failure_text(error.code, error.message))}
            alone = [self._explain([index], _part(images, at), targets) for at, index in enumerate(indices)]
            return {index: row for rows in await asyncio.gather(*alone) for index, row in rows.items()}
        provenance = self._provenance_of(answer)
        return {index: row_of(answer, at, provenance=provenance) for at, index in enumerate(indices)}

    def _facts_of(self, answer: Answer) -> dict[str, Any]:
        message = pb.Provenance.FromString(responses.provenance(answer, self._message))
        if self._target_column is not None:
            message.ClearField("target")  # each row has its own
        return MessageToDict(message, preserving_proto_field_name=True)

    def _provenance_of(self, answer: Answer) -> str:
        """Return the digest of an answer's provenance; write a new one to the folder."""
        digest = self._provenances.get(answer.provenance)
        if digest is None:
            text = json.dumps(self._facts_of(answer), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            digest = self._provenances[answer.provenance] = hashlib.sha256(text.encode()).hexdigest()
            if self._folder is not None:
                _write(self._folder / f"{digest}.json", text)
        return digest


def _read(value: object) -> Example | Row:
    try:
        return example_of(value)
    except InvalidArgument as error:
        return Row(failure_text(error.code, error.message))


def _part(images: Files | Array, at: int) -> Files | Array:
    return Files(images.files[at : at + 1]) if isinstance(images, Files) else images[at : at + 1]


def _write(path: Path, text: str) -> None:
    """Write a file that others may write with the same content at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
