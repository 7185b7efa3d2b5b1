"""The gallery of answers: one sheet with the picture, map and overlay of every example, by one or several methods."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath

from PIL import Image

from ..exceptions import InvalidArgument
from ..visualization.gallery import COLUMNS, Look, Panel, draw_comparison, draw_gallery
from ..visualization.styles import TOP_PERCENT, StyleName
from .attribution import Attribution
from .display import class_text, example_text, is_predicted
from .example import ExampleAttribution

Answers = Attribution | ExampleAttribution | Iterable[Attribution | ExampleAttribution]


def gallery(
    answers: Answers | Mapping[str, Answers],
    *,
    heading: str | None = None,
    columns: int = COLUMNS,
    titles: Sequence[str] | None = None,
    subtitles: Sequence[str] | None = None,
    colormap: str | None = None,
    style: StyleName = "color",
    top_percent: float = TOP_PERCENT,
    theme: str = "dark",
) -> Image.Image:
    """Draw every example of one or more answers on a sheet: picture, map and overlay side by side.

    `answers` is an answer, an example of one, or an iterable of both. With a top-k target, an example has one panel for
    each class. The panel of a failed example shows the error message. A mapping of names to answers for the same images
    gives a comparison: a row for each image, and a column for each name. A name may have a second line, which is
    written smaller. `columns` is not for comparisons.

    `titles` replace the predicted class and its probability, `subtitles` the file name; each has one text per panel, or
    per row of a comparison. `colormap`, `style` and `top_percent` are those of `Attribution.overlay`. `theme` is "dark"
    or "light". `InvalidArgument` if there are no examples, `FailedPrecondition` if an answer no longer has its images.
    """
    look = Look(colormap, style, top_percent, theme)
    if not isinstance(answers, Mapping):
        return draw_gallery(_retitled(_panels(answers), titles, subtitles), heading=heading, columns=columns, look=look)
    rows = rows_of(answers)
    firsts = [next((panel for panel in row if panel.picture is not None), row[0]) for row in rows]
    return draw_comparison(
        list(zip(_retitled(firsts, titles, subtitles), rows, strict=True)), list(answers), heading=heading, look=look
    )


def rows_of(answers: Mapping[str, Answers]) -> list[tuple[Panel, ...]]:
    """Return for each image its panels, one by each name."""
    columns = {name: _panels(each) for name, each in answers.items()}
    if not columns:
        raise InvalidArgument("answers: got no names, expected at least one")
    if len({len(panels) for panels in columns.values()}) > 1:
        counts = ", ".join(f"{len(panels)} by {name.splitlines()[0]}" for name, panels in columns.items())
        raise InvalidArgument(f"answers: got maps of different numbers of images, {counts}; expected the same images")
    return list(zip(*columns.values(), strict=True))


def _retitled(panels: Sequence[Panel], titles: Sequence[str] | None, subtitles: Sequence[str] | None) -> list[Panel]:
    """Return panels with other texts; None keeps the panels' own."""
    for name, texts in (("titles", titles), ("subtitles", subtitles)):
        if texts is not None and len(texts) != len(panels):
            raise InvalidArgument(f"{name}: got {len(texts)} for {len(panels)} panels, expected one for each")
    titles = titles or [panel.title for panel in panels]
    subtitles = subtitles or [panel.subtitle for panel in panels]
    return [
        dataclasses.replace(panel, title=title, subtitle=subtitle)
        for panel, title, subtitle in zip(panels, titles, subtitles, strict=True)
    ]


def _panels(answers: Answers) -> list[Panel]:
    panels = [panel for example in _examples(answers) for panel in _panels_of(example)]
    if not panels:
        raise InvalidArgument("answers: got no examples, expected at least one")
    return panels


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


def _panels_of(example: ExampleAttribution) -> Iterator[Panel]:
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
