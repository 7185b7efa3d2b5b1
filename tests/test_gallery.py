"""The gallery: every panel is on the sheet, and no text leaves its place."""

import numpy as np
import pytest
from PIL import Image, ImageFont
from sidelight._gallery import BACKGROUND, TILE, Panel, gallery, shortened


def panel(colour: tuple[int, int, int] = (250, 0, 0), *, title: str = "tiger cat  0.39") -> Panel:
    return Panel(Image.new("RGB", (224, 224), colour), np.zeros((224, 224), np.float32), title, "chelsea.png")


def test_every_panel_is_on_the_sheet() -> None:
    colours = [(250, 40 * i, 10) for i in range(5)]
    sheet = np.asarray(gallery([panel(colour) for colour in colours], heading="Five"))
    for colour in colours:
        assert (sheet == colour).all(axis=2).sum() == TILE * TILE


def test_the_sheet_grows_by_rows() -> None:
    heights = [gallery([panel()] * n).height for n in (1, 2, 3, 4, 5)]
    assert heights[0] == heights[1] < heights[2] == heights[3] < heights[4]


def test_a_long_label_ends_in_an_ellipsis_within_its_place() -> None:
    sheet = np.asarray(gallery([panel(title="a very long label " * 20)]))
    assert (sheet[:, -20:] == BACKGROUND).all()


def test_no_panels_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        gallery([])


def test_a_text_is_shortened_only_where_it_must_be() -> None:
    font = ImageFont.load_default(size=14)
    assert shortened("short", font, 500) == "short"
    cut = shortened("a long text that does not fit", font, 80)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 80
