"""Six networks of the zoo give, for each method, the results in docs/reference/models.md. `make nightly` runs all."""

import pytest

from support.models.zoo import DOCUMENT, HEAD, METHODS, ZOO, line, row

SIX = ("ResNet", "two branches", "ViT", "Swin", "SegFormer", "gated, by pixel")


@pytest.mark.parametrize("name", SIX)
def test_a_network_of_the_zoo_is_served_as_the_table_says(name: str) -> None:
    cells = row(name)
    assert line(name, cells) in DOCUMENT.read_text(encoding="utf-8").splitlines(keepends=True)
    for method in METHODS:  # a map is the oracle's, or there is none
        assert "from the oracle's" not in cells[method]


def test_the_table_has_every_network() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert HEAD in text
    assert [each for each in ZOO if f" | {each} | " not in text] == []
