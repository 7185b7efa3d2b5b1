"""Answers as one line of text, and as HTML for notebooks."""

import base64
import contextlib
import html
import itertools
from collections.abc import Iterable
from pathlib import PurePath
from typing import TYPE_CHECKING

from PIL import Image

from ..visualization.colormaps import colorize
from ..visualization.overlay import encoded, overlay
from ..visualization.sheet import fitted, shown_size
from .types import ExplainedTarget, Prediction

if TYPE_CHECKING:
    from .attribution import Attribution
    from .example import ExampleAttribution

MAX_SHOWN_TEXT = 4  # predictions in the text
MAX_SHOWN_HTML = 8  # examples in a notebook
MAX_SHOWN_LIVE = 6  # examples while a stream runs
THUMBNAIL = 112  # pixels of the longer side
MAX_LABEL, MAX_METHOD, MAX_MESSAGE = 20, 32, 100  # characters


def answer_text(answer: "Attribution") -> str:
    """Describe an answer in one line: number of examples, predicted classes, method and model."""
    if answer.error is not None:
        return f"failed: {_short(str(answer.error), MAX_MESSAGE)}"
    classes = [_prediction_text(example) for example in itertools.islice(answer, MAX_SHOWN_TEXT)]
    more = ["…"] if len(answer) > MAX_SHOWN_TEXT else []
    parts = [f"{len(answer)} example{'s' * (len(answer) != 1)}", f"maps {list(answer.maps.shape)}", *classes, *more]
    if answer.failures:
        parts.append(f"{len(answer.failures)} failed")
    if not answer.final:
        parts.append("not final")
    if (provenance := answer.provenance) is not None:
        parts.append(_short(provenance.method, MAX_METHOD))
        parts.append(f'model "{_short(provenance.model, MAX_LABEL)}"')
    return ", ".join(filter(None, parts))


def answer_html(answer: "Attribution") -> str:
    """Return an answer as HTML without scripts: predicted classes, and thumbnails of picture, map and overlay."""
    strip = _strip(map(_figure, itertools.islice(answer, MAX_SHOWN_HTML)))
    more = f"<div>… and {len(answer) - MAX_SHOWN_HTML} more</div>" if len(answer) > MAX_SHOWN_HTML else ""
    return f'<div style="font:12px sans-serif"><div>{html.escape(answer_text(answer))}</div>{strip}{more}</div>'


class LiveGallery:
    """The newest examples of a stream as HTML. An example's next map replaces its last one."""

    def __init__(self) -> None:
        self._figures: dict[tuple[int, int], str] = {}  # by batch and example

    @property
    def is_full(self) -> bool:
        return len(self._figures) == MAX_SHOWN_LIVE

    def add(self, answer: "Attribution") -> None:
        """Draw an answer's first examples, and drop the oldest ones."""
        for example in itertools.islice(answer, MAX_SHOWN_LIVE):
            self._figures[answer.index, example.index] = _figure(example)
        for key in list(self._figures)[:-MAX_SHOWN_LIVE]:
            del self._figures[key]

    def html(self) -> str:
        return _strip(self._figures.values())


def example_text(example: "ExampleAttribution") -> str:
    """Return an example's predicted class and probability, and the explained class if it is another one."""
    prediction, targets = example.prediction, example.targets
    if prediction is None or len(targets) != 1 or is_predicted(targets[0], prediction):
        return _prediction_text(example)
    return f"{_prediction_text(example)} (explained: {class_text(targets[0])})"


def class_text(each: Prediction | ExplainedTarget) -> str:
    """Return a class's label, or its index if it has no label."""
    label = _short(each.label, MAX_LABEL) if each.label else f"class {each.index}"
    against = each.against if isinstance(each, ExplainedTarget) else None
    return label if against is None else f"{label} against class {against}"


def is_predicted(target: ExplainedTarget, prediction: Prediction) -> bool:
    """Return whether the explained class is the predicted class, without a contrast."""
    return target.index == prediction.index and target.against is None


def _prediction_text(example: "ExampleAttribution") -> str:
    prediction = example.prediction
    if prediction is None:
        return "failed" if example.failure else "no map yet"
    return f"{class_text(prediction)} {prediction.probability:.2f}"


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())  # on one line
    return text if len(text) <= length else text[: length - 1] + "…"


def _strip(figures: Iterable[str]) -> str:
    return f'<div style="display:flex;flex-wrap:wrap;gap:12px;margin-top:6px">{"".join(figures)}</div>'


def _figure(example: "ExampleAttribution") -> str:
    failure = example.failure
    lines = [
        example_text(example),
        PurePath(example.name).name if example.name else "",
        failure.message if failure else "",
    ]
    caption = "<br>".join(html.escape(_short(line, MAX_MESSAGE)) for line in lines if line)
    return f'<figure style="margin:0">{_thumbnails(example)}<figcaption>{caption}</figcaption></figure>'


def _thumbnails(example: "ExampleAttribution") -> str:
    if example.prediction is None:
        return ""
    map_ = example.heatmap()
    shown = {"map": colorize(map_)}
    with contextlib.suppress(Exception):  # the images were released, or cannot be drawn: show only the map
        picture = example.picture()
        shown = {"picture": picture, **shown, "overlay": overlay(picture, map_)}
    size = shown_size(map_, THUMBNAIL)
    return "".join(_image(fitted(each, size), alt) for alt, each in shown.items())


def _image(picture: Image.Image, alt: str) -> str:
    # A third of the size of a PNG: notebooks are committed with their outputs.
    data = base64.b64encode(encoded(picture, "JPEG", quality=90)).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="data:image/jpeg;base64,{data}" alt="{alt}" {size} style="display:inline;margin:0 2px 0 0">'
