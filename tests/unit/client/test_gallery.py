"""The gallery: every panel is on the sheet in its own shape, and no text leaves its place."""

import numpy as np
import pytest
from PIL import Image, ImageFont
from sidelight.visualization.gallery import BACKGROUND, MARGIN, TILE, Panel, draw_gallery, shortened

RED = (250, 0, 0)


def panel(color: tuple[int, int, int] = RED, *, title: str = "tiger cat  0.39", height: int = 224) -> Panel:
    return Panel(Image.new("RGB", (224, 224), color), np.zeros((height, 224), np.float32), title, "chelsea.png")


def areas(sheet: Image.Image, *colors: tuple[int, int, int]) -> list[int]:
    counts = {color: count for count, color in sheet.getcolors(sheet.width * sheet.height)}
    return [counts[color] for color in colors]


def test_every_panel_is_on_the_sheet() -> None:
    colors = [(250, 4 * i, 10) for i in range(60)]
    sheet = draw_gallery([panel(color) for color in colors], heading="Sixty", columns=4)
    assert areas(sheet, *colors) == [TILE * TILE] * 60


def test_the_sheet_grows_by_rows() -> None:
    heights = [draw_gallery([panel()] * n, columns=2).height for n in (1, 2, 3, 4, 5)]
    assert heights[0] == heights[1] < heights[2] == heights[3] < heights[4]


def test_the_sheet_is_no_wider_than_its_panels() -> None:
    assert draw_gallery([panel()], columns=5).size == draw_gallery([panel()], columns=1).size


def test_a_heading_has_its_own_room() -> None:
    assert draw_gallery([panel()], heading="Why?").height > draw_gallery([panel()]).height


def test_a_picture_keeps_the_shape_of_its_map() -> None:
    assert areas(draw_gallery([panel(height=112)]), RED) == [TILE * TILE // 2]


def test_a_long_label_ends_within_its_place() -> None:
    sheet = np.asarray(draw_gallery([panel(title="a very long label " * 20)], heading="a very long heading " * 20))
    assert (sheet[:, -MARGIN:] == BACKGROUND).all()


def test_a_signed_map_brings_its_own_colors_to_the_sheet() -> None:
    signed = Panel(Image.new("RGB", (9, 9)), np.linspace(-1, 1, 81).reshape(9, 9), "", "")
    unsigned = Panel(Image.new("RGB", (9, 9)), np.linspace(0, 1, 81).reshape(9, 9), "", "")
    footers = [np.asarray(draw_gallery(panels))[-60:, :300] for panels in ([signed], [unsigned])]
    assert (footers[0] != footers[1]).any()


def test_a_text_is_shortened_only_where_it_must_be() -> None:
    font = ImageFont.load_default(size=14)
    assert shortened("short", font, 500) == "short"
    cut = shortened("a long text that does not fit", font, 80)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 80


def test_no_panels_and_no_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        draw_gallery([])
    with pytest.raises(ValueError, match="columns: got 0"):
        draw_gallery([panel()], columns=0)
