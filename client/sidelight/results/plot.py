"""Answers as a figure of matplotlib, from the extra `sidelight[plot]`: methods side by side."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..exceptions import InvalidArgument
from ..visualization.colormaps import color_bar, color_scale, colorize, is_signed
from ..visualization.gallery import Look, Panel
from ..visualization.styles import TOP_PERCENT, StyleName
from .gallery import Answers, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TILE_INCHES = 1.9
MAP = "map"


def plot(
    answers: Answers | Mapping[str, Answers],
    *,
    colormap: str | None = None,
    style: StyleName | str = "color",
    top_percent: float = TOP_PERCENT,
) -> "Figure":
    """Return a figure of matplotlib with a row for each image: the picture, and its overlay by each method.

    `answers` is as in `gallery`: answers, or a mapping of names to answers for the same images. `style` is one of
    `Attribution.overlay`, or "map" for the maps themselves. Each has a color bar with the map's own scale. The figure
    is not one of pyplot's: a notebook shows it, and `savefig` writes it. `InvalidArgument` without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidArgument("plot needs matplotlib: pip install 'sidelight[plot]'") from None

    class Plot(Figure):
        def _repr_jpeg_(self) -> bytes:  # a fifth of the size of a PNG
            file = io.BytesIO()
            self.savefig(file, format="jpeg", dpi=80, pil_kwargs={"quality": 85})
            return file.getvalue()

    named = answers if isinstance(answers, Mapping) else {"": answers}
    rows = rows_of(named)
    size = TILE_INCHES * (1 + len(named)), (TILE_INCHES + 0.35) * len(rows)
    figure = Plot(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), 1 + len(named), squeeze=False)
    look = Look(colormap, "color" if style == MAP else style, top_percent)  # type: ignore[arg-type]  # overlay checks it
    for i, (panels, line) in enumerate(zip(rows, axes, strict=True)):
        shown = next((panel for panel in panels if panel.picture is not None), panels[0])
        if shown.picture is not None:
            line[0].imshow(np.asarray(shown.picture))
        line[0].set_title(shown.title, fontsize=8)
        for name, panel, place in zip(named, panels, line[1:], strict=True):
            _draw(place, panel, look, is_map=style == MAP)
            if i == 0:
                place.set_title(name.replace("\n", ": ", 1), fontsize=8, wrap=True)
    for place in axes.flat:
        place.set_xticks([])
        place.set_yticks([])
    return figure


def _draw(place: "Axes", panel: Panel, look: Look, *, is_map: bool) -> None:
    """Draw a panel's map with its color bar. A failed example leaves its place empty."""
    if panel.picture is None or panel.map is None:
        return
    drawn = colorize(panel.map, colormap=look.colormap) if is_map else look.overlay(panel.picture, panel.map)
    place.imshow(np.asarray(drawn))
    signed = is_signed(panel.map)
    low, high = color_scale(panel.map)
    bar = place.inset_axes((0.0, -0.09, 1.0, 0.05))
    bar.imshow(np.asarray(color_bar(256, 1, signed=signed, colormap=look.colormap)), aspect="auto")
    bar.set_yticks([])
    bar.set_xticks([0, 255], [f"{-high if signed else low:.2g}", f"{high:.2g}"], fontsize=6)
    bar.tick_params(length=0, pad=1)
