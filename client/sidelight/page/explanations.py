"""`Explainer`: makes the page's calls to the server, and converts answers to events for the browser."""

import asyncio
import base64
import contextlib
import dataclasses
import re
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._inputs.batch import Batch
from .._inputs.targets import Choice, Contrast, Target
from ..aio import AsyncClient
from ..exceptions import InvalidArgument, NotFound, SidelightError, from_code, public_name
from ..methods.parsing import parse_method
from ..results.attribution import Attribution
from ..results.server_info import ModelInfo
from ..results.storage import FACTS, MAPS, plain
from ..visualization.colormaps import color_scale, is_signed
from ..visualization.overlay import smoothed_map
from .pictures import Picture

MAX_ANSWERS = 64  # kept for downloads
N_CLASSES = 10  # the most probable ones, shown as bars

Event = dict[str, Any]

_FIELD = re.compile(r"[a-z_]+(\.[a-z_]+)*(?=[:\[])")


class Explainer:
    """The calls of the page to the server. It keeps the last answers for downloads."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._answers: OrderedDict[str, Attribution] = OrderedDict()
        self._models: dict[str, ModelInfo] = {}  # with labels and layers, by digest

    async def explain(self, picture: Picture, options: Mapping[str, object]) -> AsyncGenerator[Event]:
        """Yield maps of one picture as they improve, the last one final; or one event with an error.

        `options` has `model`, `target`, `against`, `method` as text, `score` and `channels`; each may be missing.
        """
        began = time.perf_counter()
        try:
            content = await asyncio.to_thread(picture.read)
            answers = self._client.stream(
                [Batch([content])],
                target=_target(options),
                method=parse_method(_text(options, "method") or "gradient"),
                probabilities=True,
                partial=True,
                on_error="return",
                keep_images=True,
                **_given(options, "model", "score", "channels"),
            )
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    _check(answer)
                    if answer.predictions[0] is None:
                        continue  # no map yet
                    event = await asyncio.to_thread(_map_event, answer, await self._model(answer))
                    if answer.final:
                        event["id"] = self._keep(answer, picture)
                    event["elapsed_s"] = time.perf_counter() - began
                    yield event
        except SidelightError as error:
            yield error_event(error)

    async def classify(self, pictures: Sequence[Picture], model: str | None) -> AsyncGenerator[Event]:
        """Yield the predicted class of each picture, in any order, by a method of one row."""
        try:
            batches = (Batch([content]) for content in _contents(pictures))
            async with contextlib.aclosing(self._client.stream(batches, model=model, on_error="return")) as answers:
                async for answer in answers:
                    yield {"picture": pictures[answer.index].id} | _class_event(answer)
        except SidelightError as error:
            yield error_event(error)

    async def model(self, name: str | None) -> Event:
        model = await self._client.model(name)
        self._models[model.digest] = model
        return {"name": model.name, "labels": model.labels or (), "layers": model.layers or ()}

    async def file(self, id_: str, name: str) -> bytes:
        """Return `answer.json` or `maps.npy` of an answer, as `Attribution.save` writes them."""
        answer = self._answers.get(id_)
        if answer is None or name not in (FACTS, MAPS):
            raise NotFound("answer: the page no longer has this answer; explain the picture again")
        return await asyncio.to_thread(_saved_file, answer, name)

    async def _model(self, answer: Attribution) -> ModelInfo | None:
        provenance = answer.provenance
        if provenance is None:
            return None
        if provenance.model_digest not in self._models:
            await self.model(provenance.model)
        return self._models.get(provenance.model_digest)

    def _keep(self, answer: Attribution, picture: Picture) -> str:
        id_ = secrets.token_urlsafe(12)
        self._answers[id_] = dataclasses.replace(answer, names=(picture.name,))
        while len(self._answers) > MAX_ANSWERS:
            self._answers.popitem(last=False)
        return id_


def error_event(error: SidelightError) -> Event:
    """Return an error as an event. `field` is the argument that the message begins with, such as "method.steps"."""
    named = _FIELD.match(error.message)
    parts = named[0].split(".") if named else []
    if len(parts) > 2:  # the server's fields have the method's name in between
        del parts[1]
    return {
        "event": "error",
        "type": public_name(error),
        "field": ".".join(parts),
        "message": error.message,
        "code": error.code,
    }


def _check(answer: Attribution) -> None:
    """Raise the error of an answer without a map."""
    if answer.error is not None:
        raise answer.error
    if answer.failures:
        failure = answer.failures[0]
        raise from_code(failure.code, failure.message)


def _map_event(answer: Attribution, model: ModelInfo | None) -> Event:
    example = answer[0]
    values = example.heatmap()  # [H, W]
    target = example.targets[0]
    return {
        "event": "map",
        "final": answer.final,
        "shape": values.shape,
        "signed": is_signed(values),
        "raw": _layer(values),
        "smooth": _layer(smoothed_map(values).astype(np.float32)),
        "prediction": plain(example.prediction),
        "target": plain(target) | {"advice": target.advice},
        "geometry": plain(example.geometry),
        "convergence": plain(example.convergence),
        "timing": plain(answer.timing),
        "provenance": plain(answer.provenance) if answer.final else None,
        "classes": _top_classes(example.probabilities, model),
    }


def _layer(values: NDArray[np.float32]) -> Event:
    """Return a map's values, and the magnitudes that its colors begin and end with."""
    low, high = color_scale(values)
    return {"low": low, "high": high, "data": base64.b64encode(values.astype("<f4").tobytes()).decode()}


def _top_classes(probabilities: NDArray[np.float32] | None, model: ModelInfo | None) -> list[Event]:
    if probabilities is None:
        return []
    labels = (model.labels if model else None) or ()
    order = np.argsort(-probabilities, kind="stable")[:N_CLASSES]
    return [
        {"index": int(i), "label": labels[i] if i < len(labels) else "", "probability": plain(float(probabilities[i]))}
        for i in order
    ]


def _class_event(answer: Attribution) -> Event:
    try:
        _check(answer)
    except SidelightError as error:
        return error_event(error)
    return {"event": "class", "prediction": plain(answer.predictions[0])}


def _contents(pictures: Sequence[Picture]) -> Iterator[bytes]:
    for picture in pictures:
        try:
            yield picture.read()
        except SidelightError:
            yield b"unreadable"  # the server rejects only this one


def _target(options: Mapping[str, object]) -> Target:
    """Return the target of two class indices or labels; None is the predicted class."""
    target, against = (_choice(options, name) for name in ("target", "against"))
    if against is None:
        return target
    if target is None:
        raise InvalidArgument("target: got none together with against, expected a class to subtract from")
    return Contrast(target, against)


def _choice(options: Mapping[str, object], name: str) -> Choice | None:
    value = options.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | str)):
        raise InvalidArgument(f"{name}: got {type(value).__name__}, expected a class index or a label")
    return value


def _text(options: Mapping[str, object], name: str) -> str | None:
    value = options.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidArgument(f"{name}: got {type(value).__name__}, expected text")
    return value or None


def _given(options: Mapping[str, object], *names: str) -> dict[str, Any]:
    """Return the options that are given, of these names."""
    return {name: value for name in names if (value := _text(options, name)) is not None}


def _saved_file(answer: Attribution, name: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="sidelight-page-") as folder:
        answer.save(Path(folder) / "answer")
        return (Path(folder) / "answer" / name).read_bytes()
