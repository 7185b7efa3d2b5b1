"""The gallery: one sheet of pictures, each with its map and its overlay."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..exceptions import InvalidArgument
from .colormaps import PERCENTILE, Map, color_bar, colorize, is_signed
from .overlay import overlay

TILE = 224  # pixels of a picture's longer side
TILE_GAP = 4
MARGIN = 32
PADDING = 14
CAPTION_HEIGHT = 58
HEADER_HEIGHT = 84
FOOTER_HEIGHT = 72
BAR_WIDTH, BAR_HEIGHT = 240, 12
COLUMNS = 2

BACKGROUND = (15, 16, 20)
CARD = (25, 27, 33)
BRIGHT = (240, 238, 232)
DIM = (156, 158, 168)

NOTE = "picture, map, overlay (smoothed map)"
CELL_WIDTH = 3 * TILE + 2 * TILE_GAP + 2 * PADDING

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """The input picture, its map `[H, W]`, and two lines of text. A failed example has neither picture nor map."""

    picture: Image.Image | None
    map: Map | None
    title: str
    subtitle: str


def draw_gallery(
    panels: Sequence[Panel], *, heading: str | None = None, columns: int = COLUMNS, colormap: str | None = None
) -> Image.Image:
    """Draw a sheet of panels: picture, map and overlay side by side, and a color bar at the bottom.

    With fewer panels than `columns` the sheet is narrower. `InvalidArgument` if there are no panels or no columns.
    """
    if not panels:
        raise InvalidArgument("panels: got none, expected at least one")
    if columns < 1:
        raise InvalidArgument(f"columns: got {columns}, expected 1 or more")
    columns = min(columns, len(panels))
    tallest = max((shown_size(panel.map, TILE)[1] for panel in panels if panel.map is not None), default=0)
    step_x, step_y = CELL_WIDTH + MARGIN, PADDING + tallest + CAPTION_HEIGHT + MARGIN
    top = HEADER_HEIGHT if heading else MARGIN
    n_rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (MARGIN + columns * step_x, top + n_rows * step_y + FOOTER_HEIGHT - MARGIN), BACKGROUND)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        cell = (MARGIN + column * step_x, top + row * step_y)
        _draw_panel(sheet, panel, cell=cell, height=step_y - MARGIN, colormap=colormap)
    if heading:
        _write(sheet, (MARGIN, 28), heading, size=28, color=BRIGHT, width=sheet.width - 2 * MARGIN)
    _draw_footer(
        sheet, signs=sorted({is_signed(panel.map) for panel in panels if panel.map is not None}), colormap=colormap
    )
    return sheet


def shown_size(map_: Map, longest: int) -> tuple[int, int]:
    """Return the width and height of a map, scaled so that the longer side has `longest` pixels."""
    height, width = map_.shape
    ratio = longest / max(height, width)
    return max(1, round(width * ratio)), max(1, round(height * ratio))


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a picture. At 2× or more, pixels are repeated, so that the pixels of a coarse map stay visible."""
    coarse = 2 * picture.width <= size[0]
    return picture.resize(size, Image.Resampling.NEAREST if coarse else Image.Resampling.LANCZOS)


def shortened(text: str, font: Font, width: float) -> str:
    """Return the text, cut and ended by an ellipsis if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text.rstrip() + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _draw_panel(sheet: Image.Image, panel: Panel, *, cell: tuple[int, int], height: int, colormap: str | None) -> None:
    left, top = cell
    corners = (left, top, left + CELL_WIDTH - 1, top + height - 1)
    ImageDraw.Draw(sheet).rounded_rectangle(corners, radius=10, fill=CARD)
    for index, tile in enumerate(_tiles(panel, colormap)):
        x = left + PADDING + index * (TILE + TILE_GAP) + (TILE - tile.width) // 2
        sheet.paste(tile, (x, top + PADDING))
    left, width, bottom = left + PADDING, CELL_WIDTH - 2 * PADDING, top + height
    _write(sheet, (left, bottom - 50), panel.title, size=20, color=BRIGHT, width=width)
    _write(sheet, (left, bottom - 25), panel.subtitle, size=14, color=DIM, width=width)


def _tiles(panel: Panel, colormap: str | None) -> tuple[Image.Image, ...]:
    if panel.picture is None or panel.map is None:
        return ()
    overlaid = overlay(panel.picture, panel.map, colormap=colormap)
    tiles = panel.picture.convert("RGB"), colorize(panel.map, colormap=colormap), overlaid
    return tuple(fitted(tile, shown_size(panel.map, TILE)) for tile in tiles)


def _draw_footer(sheet: Image.Image, *, signs: Sequence[bool], colormap: str | None) -> None:
    top = sheet.height - FOOTER_HEIGHT + 22
    for index, signed in enumerate(signs):
        left = MARGIN + index * (BAR_WIDTH + MARGIN)
        sheet.paste(color_bar(BAR_WIDTH, BAR_HEIGHT, signed=signed, colormap=colormap), (left, top))
        most = f"{PERCENTILE:g}th percentile of each map"
        labels = ((0.0, "-"), (0.5, "0"), (1.0, f"+ {PERCENTILE:g}th pct.")) if signed else ((0.0, "0"), (1.0, most))
        for share, label in labels:
            x = left + share * (BAR_WIDTH - ImageFont.load_default(size=13).getlength(label))
            _write(sheet, (round(x), top + BAR_HEIGHT + 5), label, size=13, color=DIM, width=BAR_WIDTH)
    left = MARGIN + len(signs) * (BAR_WIDTH + MARGIN)
    _write(sheet, (left, top - 3), NOTE, size=14, color=DIM, width=sheet.width - left - MARGIN)


def _write(
    sheet: Image.Image, position: tuple[int, int], text: str, *, size: int, color: tuple[int, int, int], width: int
) -> None:
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(sheet).text(position, shortened(text, font, width), color, font)
