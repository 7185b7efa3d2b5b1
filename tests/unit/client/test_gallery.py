"""The gallery: every panel is on the sheet with its aspect ratio, and no text overflows."""

import numpy as np
import pytest
from PIL import Image, ImageFont
from sidelight.visualization.gallery import COMPARED_TILE, MARGIN, TILE, Look, Panel, draw_comparison, draw_gallery
from sidelight.visualization.sheet import THEMES, draw_bar, shortened

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


def test_a_heading_does_not_overlap_the_images() -> None:
    assert draw_gallery([panel()], heading="Why?").height > draw_gallery([panel()]).height


def test_a_picture_keeps_the_shape_of_its_map() -> None:
    assert areas(draw_gallery([panel(height=112)]), RED) == [TILE * TILE // 2]


def test_a_long_label_ends_within_its_place() -> None:
    sheet = np.asarray(draw_gallery([panel(title="a very long label " * 20)], heading="a very long heading " * 20))
    assert (sheet[:, -MARGIN:] == THEMES["dark"].background).all()


def color_bar_of(map_: np.ndarray) -> np.ndarray:
    sheet = Image.new("RGB", (200, 40))
    draw_bar(sheet, (0, 0), map_, width=200, colormap=None, color=(255, 255, 255))
    return np.asarray(sheet)


def test_a_color_bar_has_the_colors_and_ends_of_its_map() -> None:
    unsigned = np.linspace(0, 1, 81).reshape(9, 9)
    bars = [color_bar_of(map_) for map_ in (unsigned, 2 * unsigned - 1, unsigned + 9, 2 * unsigned)]
    assert (bars[0][:8] != bars[1][:8]).any()
    assert (bars[0][:8] == bars[2][:8]).all()
    assert all((bars[0][8:] != other[8:]).any() for other in bars[1:])  # the text of the ends


@pytest.mark.parametrize("theme", THEMES)
def test_texts_stand_out_from_every_background(theme: str) -> None:
    """By 4.5 to 1, as WCAG 2.1 asks of text (level AA)."""

    def luminance(color: tuple[int, int, int]) -> float:
        encoded = np.array(color) / 255
        linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
        return float(linear @ np.array([0.2126, 0.7152, 0.0722]))

    colors = THEMES[theme]
    for text in (colors.bright, colors.dim):
        for background in (colors.background, colors.card):
            low, high = sorted(map(luminance, (text, background)))
            assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("theme", THEMES)
def test_a_theme_colors_the_sheet(theme: str) -> None:
    assert draw_gallery([panel()], look=Look(theme=theme)).getpixel((0, 0)) == THEMES[theme].background


def test_a_comparison_has_a_row_for_each_picture_and_a_column_for_each_name() -> None:
    colors = [(250, 40 * i, 10) for i in range(3)]
    rows = [(panel(color), [panel(color)] * 2) for color in colors]
    sheet = draw_comparison(rows, ["gradient\nfine", "Grad-CAM\ncoarse"], heading="Which pixels decided?")
    assert areas(sheet, *colors) == [COMPARED_TILE * COMPARED_TILE] * 3
    taller = draw_comparison([*rows, rows[0]], ["one", "two"], heading="Which pixels decided?")
    wider = draw_comparison(
        [(first, [first] * 3) for first, _ in rows], ["1", "2", "3"], heading="Which pixels decided?"
    )
    assert (taller.width, wider.height) == sheet.size
    assert taller.height > sheet.height
    assert wider.width > sheet.width


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
    with pytest.raises(ValueError, match="theme: got 'sepia'"):
        draw_gallery([panel()], look=Look(theme="sepia"))
