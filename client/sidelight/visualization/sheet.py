"""What sheets of pictures are drawn with: themes, text, tiles and color bars."""

from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..exceptions import InvalidArgument
from .colormaps import Map, Pixels, color_bar, color_scale, is_signed

BAR_HEIGHT, BAR_TEXT = 8, 12
BAR_SPACE = 34  # from the lower edge of a tile to the end of its bar's text

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Color = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Theme:
    """The colors of a sheet."""

    background: Color
    card: Color
    bright: Color  # titles
    dim: Color  # notes


THEMES = {
    "dark": Theme((15, 16, 20), (25, 27, 33), (240, 238, 232), (156, 158, 168)),
    "light": Theme((255, 255, 255), (243, 244, 246), (24, 26, 32), (88, 92, 104)),
}


def find_theme(name: str) -> Theme:
    """Return a theme by name."""
    if name not in THEMES:
        raise InvalidArgument(f"theme: got {name!r}, expected one of {', '.join(THEMES)}")
    return THEMES[name]


def shown_size(map_: Map | Pixels, longest: int) -> tuple[int, int]:
    """Return the width and height of a map, scaled so that the longer side has `longest` pixels."""
    height, width = map_.shape[:2]
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


def write(sheet: Image.Image, position: tuple[float, float], text: str, *, size: int, color: Color, width: int) -> None:
    """Write one line of text with its upper left corner at a position, no wider than `width` pixels."""
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(sheet).text(position, shortened(text, font, width), color, font)


def draw_bar(
    sheet: Image.Image, position: tuple[int, int], map_: Map, *, width: int, colormap: str | None, color: Color
) -> None:
    """Draw a map's color bar, with the values at its ends, as `colorize` draws the map."""
    left, top = position
    signed = is_signed(map_)
    sheet.paste(color_bar(width, BAR_HEIGHT, signed=signed, colormap=colormap), position)
    for share, label in _bar_labels(map_, signed=signed).items():
        length = ImageFont.load_default(size=BAR_TEXT).getlength(label)
        place = left + share * (width - length), top + BAR_HEIGHT + 3
        write(sheet, place, label, size=BAR_TEXT, color=color, width=width)


def _bar_labels(map_: Map, *, signed: bool) -> dict[float, str]:
    """Return the texts of a map's color bar, by their position from 0 to 1."""
    low, high = color_scale(map_)
    if signed:
        return {0.0: f"{-high:.2g}", 0.5: f"from {-low:.2g}" if low else "0", 1.0: f"{high:.2g}"}
    return {0.0: f"from {low:.2g}" if low else "0", 1.0: f"{high:.2g}"}
