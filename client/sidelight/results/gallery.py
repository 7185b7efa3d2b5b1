"""The gallery of answers: one sheet with the picture, map and overlay of every example."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath

from PIL import Image

from ..exceptions import InvalidArgument
from ..visualization.gallery import COLUMNS, Panel, draw_gallery
from .attribution import Attribution
from .display import class_text, example_text, is_predicted
from .example import ExampleAttribution

Answers = Attribution | ExampleAttribution | Iterable[Attribution | ExampleAttribution]


def gallery(
    answers: Answers,
    *,
    heading: str | None = None,
    columns: int = COLUMNS,
    titles: Sequence[str] | None = None,
    subtitles: Sequence[str] | None = None,
    colormap: str | None = None,
) -> Image.Image:
    """Draw every example of one or more answers on a sheet: picture, map and overlay side by side.

    `answers` is an answer, an example of one, or an iterable of both. With a top-k target, an example has one panel for
    each class. The panel of a failed example shows the error message. `titles` replace the predicted class and its
    probability, `subtitles` the file name; each has one text per panel. `colormap` is that of `Attribution.overlay`.
    `InvalidArgument` if there are no examples, `FailedPrecondition` if an answer no longer has its images.
    """
    panels = [panel for example in _examples(answers) for panel in _panels(example)]
    if not panels:
        raise InvalidArgument("answers: got no examples, expected at least one")
    for name, texts in (("titles", titles), ("subtitles", subtitles)):
        if texts is not None and len(texts) != len(panels):
            raise InvalidArgument(f"{name}: got {len(texts)} for {len(panels)} panels, expected one for each")
    titles = titles or [panel.title for panel in panels]
    subtitles = subtitles or [panel.subtitle for panel in panels]
    panels = [
        dataclasses.replace(panel, title=title, subtitle=subtitle)
        for panel, title, subtitle in zip(panels, titles, subtitles, strict=True)
    ]
    return draw_gallery(panels, heading=heading, columns=columns, colormap=colormap)


def _examples(answers: Answers) -> Iterator[ExampleAttribution]:
    match answers:
        case ExampleAttribution():
            yield answers
        case Attribution(error=error) if error is not None:
            raise error
        case Attribution():
            yield from answers
        case Iterable():
            for each in answers:
                yield from _examples(each)
        case _:
            raise InvalidArgument(f"answers: got {type(answers).__name__}, expected answers or examples of answers")


def _panels(example: ExampleAttribution) -> Iterator[Panel]:
    prediction, failure = example.prediction, example.failure
    subtitle = PurePath(example.name).name if example.name else f"example {example.index}"
    if prediction is None:
        yield Panel(None, None, example_text(example), failure.message if failure else subtitle)
        return
    for k, target in enumerate(example.targets):
        title = f"{class_text(prediction)}  {prediction.probability:.2f}"
        if not is_predicted(target, prediction):
            title = f"{class_text(target)}  (predicted: {title})"
        yield Panel(example.picture(), example.heatmap(k=k), title, subtitle)
