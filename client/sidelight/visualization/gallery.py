"""Sheets of pictures: the gallery, with a card for each map, and the comparison, with a column for each method."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ..exceptions import InvalidArgument
from .colormaps import HIGH_PERCENTILE, LOW_PERCENTILE, Map, colorize
from .overlay import overlay
from .sheet import BAR_SPACE, Theme, draw_bar, find_theme, fitted, shown_size, write
from .styles import TOP_PERCENT, StyleName

TILE, COMPARED_TILE = 224, 168  # pixels of a picture's longer side
TILE_GAP = 4
GROUP_GAP = 22  # between the methods of a comparison
MARGIN = 32
PADDING = 14
CAPTION_HEIGHT = 58
HEADER_HEIGHT, HEADS_HEIGHT = 84, 58
FOOTER_HEIGHT = 50
COLUMNS = 2

NOTE = (
    f"Colors end at a map's {HIGH_PERCENTILE:g}th percentile. They begin at 0, or, where the bar says “from”, at the "
    f"{LOW_PERCENTILE:g}st percentile, because the map is large everywhere. Overlays show the smoothed map."
)
CELL_WIDTH = 3 * TILE + 2 * TILE_GAP + 2 * PADDING


@dataclass(frozen=True, slots=True)
class Look:
    """How the maps and the texts of a sheet are drawn."""

    colormap: str | None = None
    style: StyleName = "color"
    top_percent: float = TOP_PERCENT
    theme: str = "dark"

    @property
    def colors(self) -> Theme:
        return find_theme(self.theme)

    def overlay(self, picture: Image.Image, map_: Map) -> Image.Image:
        return overlay(picture, map_, colormap=self.colormap, style=self.style, top_percent=self.top_percent)


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """The input picture, its map `[H, W]`, and two lines of text. A failed example has neither picture nor map."""

    picture: Image.Image | None
    map: Map | None
    title: str
    subtitle: str


def draw_gallery(
    panels: Sequence[Panel], *, heading: str | None = None, columns: int = COLUMNS, look: Look = Look()
) -> Image.Image:
    """Draw a sheet of panels: picture, map with its color bar, and overlay side by side.

    With fewer panels than `columns` the sheet is narrower. `InvalidArgument` if there are no panels or no columns.
    """
    if not panels:
        raise InvalidArgument("panels: got none, expected at least one")
    if columns < 1:
        raise InvalidArgument(f"columns: got {columns}, expected 1 or more")
    columns = min(columns, len(panels))
    tallest = _tallest(panels, TILE)
    step_x, step_y = CELL_WIDTH + MARGIN, PADDING + tallest + BAR_SPACE + CAPTION_HEIGHT + MARGIN
    top = HEADER_HEIGHT if heading else MARGIN
    n_rows = -(-len(panels) // columns)
    size = MARGIN + columns * step_x, top + n_rows * step_y + FOOTER_HEIGHT - MARGIN
    sheet = _empty_sheet(size, heading, look)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        left, top_ = MARGIN + column * step_x, top + row * step_y
        corners = (left, top_, left + CELL_WIDTH - 1, top_ + step_y - MARGIN - 1)
        ImageDraw.Draw(sheet).rounded_rectangle(corners, radius=10, fill=look.colors.card)
        left += PADDING
        _draw_picture(sheet, panel, (left, top_ + PADDING), tile=TILE)
        _draw_map(sheet, panel, (left + TILE + TILE_GAP, top_ + PADDING), tile=TILE, look=look)
        place = left, top_ + step_y - MARGIN - 50
        _draw_texts(sheet, (panel.title, panel.subtitle), place, width=CELL_WIDTH - 2 * PADDING, look=look)
    return sheet


def draw_comparison(
    rows: Sequence[tuple[Panel, Sequence[Panel]]],
    names: Sequence[str],
    *,
    heading: str | None = None,
    look: Look = Look(),
) -> Image.Image:
    """Draw one row for each picture and its texts, from its panel, with a map and overlay for each of the names."""
    tile = COMPARED_TILE
    group = 2 * tile + TILE_GAP
    tallest = max(_tallest(panels, tile) for _, panels in rows)
    step_x, step_y = group + GROUP_GAP, tallest + BAR_SPACE + PADDING
    first = MARGIN + tile + GROUP_GAP
    top = (HEADER_HEIGHT if heading else MARGIN) + HEADS_HEIGHT
    size = first + len(names) * step_x - GROUP_GAP + MARGIN, top + len(rows) * step_y + FOOTER_HEIGHT
    sheet = _empty_sheet(size, heading, look)
    for column, name in enumerate(names):
        title, _, note = name.partition("\n")
        place = first + column * step_x, top - HEADS_HEIGHT
        _draw_texts(sheet, (title, note), place, width=group, look=look)
    for index, (shown, panels) in enumerate(rows):
        y = top + index * step_y
        height = _draw_picture(sheet, shown, (MARGIN, y), tile=tile)
        _draw_texts(sheet, (shown.title, shown.subtitle), (MARGIN, y + height + 2), width=tile, look=look, size=14)
        for column, panel in enumerate(panels):
            _draw_map(sheet, panel, (first + column * step_x, y), tile=tile, look=look)
    return sheet


def _empty_sheet(size: tuple[int, int], heading: str | None, look: Look) -> Image.Image:
    sheet = Image.new("RGB", size, look.colors.background)
    width = sheet.width - 2 * MARGIN
    if heading:
        write(sheet, (MARGIN, 28), heading, size=28, color=look.colors.bright, width=width)
    write(sheet, (MARGIN, sheet.height - 34), NOTE, size=14, color=look.colors.dim, width=width)
    return sheet


def _tallest(panels: Sequence[Panel], tile: int) -> int:
    return max((shown_size(panel.map, tile)[1] for panel in panels if panel.map is not None), default=0)


def _draw_picture(sheet: Image.Image, panel: Panel, position: tuple[int, int], *, tile: int) -> int:
    """Draw a panel's picture, and return its height."""
    if panel.picture is None or panel.map is None:
        return 0
    return _paste(sheet, panel.picture.convert("RGB"), panel.map, position, tile)


def _draw_map(sheet: Image.Image, panel: Panel, position: tuple[int, int], *, tile: int, look: Look) -> None:
    """Draw a panel's map with its color bar, and to the right the overlay."""
    if panel.picture is None or panel.map is None:
        return
    left, top = position
    height = _paste(sheet, colorize(panel.map, colormap=look.colormap), panel.map, position, tile)
    place = left, top + height + 6
    draw_bar(sheet, place, panel.map, width=tile, colormap=look.colormap, color=look.colors.dim)
    _paste(sheet, look.overlay(panel.picture, panel.map), panel.map, (left + tile + TILE_GAP, top), tile)


def _paste(sheet: Image.Image, picture: Image.Image, map_: Map, position: tuple[int, int], tile: int) -> int:
    """Paste a picture in the shape of its map, centered in the width of a tile, and return its height."""
    width, height = shown_size(map_, tile)
    sheet.paste(fitted(picture, (width, height)), (position[0] + (tile - width) // 2, position[1]))
    return height


def _draw_texts(
    sheet: Image.Image, texts: tuple[str, str], position: tuple[int, int], *, width: int, look: Look, size: int = 20
) -> None:
    """Write a title, and below it a smaller note."""
    (left, top), (title, note) = position, texts
    write(sheet, (left, top), title, size=size, color=look.colors.bright, width=width)
    write(sheet, (left, top + round(1.25 * size)), note, size=max(13, size - 6), color=look.colors.dim, width=width)
