"""The gallery: many pictures, each with its map and its overlay, on one sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ._picture import PERCENTILE, colour_bar, colourise, overlay

TILE = 208  # pixels along each side of a picture
GAP = 4
MARGIN = 28
CAPTION_HEIGHT = 54
HEADER_HEIGHT = 92
BAR_WIDTH, BAR_HEIGHT = 220, 12

BACKGROUND = (17, 18, 23)
BRIGHT = (240, 238, 232)
DIM = (150, 150, 160)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class Panel:
    """One example: what the model saw, its map [H, W], and two lines of text."""

    picture: Image.Image
    map: NDArray[Any]
    title: str
    subtitle: str


def gallery(panels: Sequence[Panel], *, heading: str = "", columns: int = 2) -> Image.Image:
    """Return a sheet of panels, each of them picture, map and overlay side by side. `ValueError` for no panels."""
    if not panels:
        raise ValueError("panels: none, expected at least one")
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    cell_width, cell_height = 3 * TILE + 2 * GAP, TILE + CAPTION_HEIGHT
    width = columns * (cell_width + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, HEADER_HEIGHT + rows * (cell_height + MARGIN)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _draw_header(sheet, draw, heading)
    for place, panel in enumerate(panels):
        row, column = divmod(place, columns)
        left = MARGIN + column * (cell_width + MARGIN)
        _draw_panel(sheet, draw, panel, left=left, top=HEADER_HEIGHT + row * (cell_height + MARGIN))
    return sheet


def _draw_header(sheet: Image.Image, draw: ImageDraw.ImageDraw, heading: str) -> None:
    left = sheet.width - MARGIN - BAR_WIDTH
    draw.text((MARGIN, 28), shortened(heading, _font(26), left - 2 * MARGIN), BRIGHT, _font(26))
    sheet.paste(colour_bar(BAR_WIDTH, BAR_HEIGHT), (left, 30))
    draw.text((left, 48), "0", DIM, _font(13))
    most = f"{PERCENTILE:g}th percentile"
    draw.text((left + BAR_WIDTH - _font(13).getlength(most), 48), most, DIM, _font(13))


def _draw_panel(sheet: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, *, left: int, top: int) -> None:
    parts = (panel.picture.convert("RGB"), colourise(panel.map), overlay(panel.picture, panel.map))
    for place, part in enumerate(parts):
        tile = part.resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile, (left + place * (TILE + GAP), top))
    width = 3 * TILE + 2 * GAP
    draw.text((left, top + TILE + 7), shortened(panel.title, _font(19), width), BRIGHT, _font(19))
    draw.text((left, top + TILE + 32), shortened(panel.subtitle, _font(14), width), DIM, _font(14))


def shortened(text: str, font: Font, width: float) -> str:
    """Return a text, ended by an ellipsis where it would be wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)
