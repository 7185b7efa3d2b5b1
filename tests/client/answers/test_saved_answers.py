"""Overlays of answers, and answers that are saved."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import sidelight
import torch
from PIL import Image


@pytest.mark.parametrize("channels", ["max_abs", "none", "l2", "sum", "mean_abs"])
def test_a_map_is_drawn_over_the_picture_whatever_its_channels(client: sidelight.Client, channels: str) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    answer = client.attribute(picture, channels=channels)
    assert answer.maps.shape == ((1, 3, 32, 32) if channels == "none" else (1, 32, 32))
    drawn = np.abs(answer.maps[0]).max(axis=0) if channels == "none" else answer.maps[0]
    np.testing.assert_array_equal(answer.heatmap(0), drawn)
    overlay = answer.overlay(0)
    assert (overlay.mode, overlay.size) == ("RGB", (32, 32))
    assert overlay.tobytes() != answer.picture(0).tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_map_is_drawn_over_floats(client: sidelight.Client, floats: torch.Tensor, dtype: torch.dtype) -> None:
    answer = client.attribute(floats.to(dtype), method=sidelight.Gradient(signed=True), channels="sum")
    for i in range(5):
        assert answer.overlay(i).size == answer.picture(i).size == (32, 32)


def test_an_answer_is_saved_with_maps_facts_and_overlays(client: sidelight.Client, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, size, np.uint8) for size in ((40, 50, 3), (32, 32, 3), (90, 33, 3))]
    answer = client.attribute(pictures, target=["elk", 1, "ibis"])
    folder = tmp_path / "made" / "for it"
    answer.save(folder)
    assert sorted(each.name for each in folder.iterdir()) == [
        "000.png",
        "001.png",
        "002.png",
        "answer.json",
        "maps.npy",
    ]
    np.testing.assert_array_equal(np.load(folder / "maps.npy"), answer.maps)
    for i in range(3):
        with Image.open(folder / f"{i:03}.png") as overlay:
            assert overlay.tobytes() == answer.overlay(i).tobytes()
    facts = json.loads((folder / "answer.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert [each["target"]["label"] for each in facts["examples"]] == ["elk", "bee", "ibis"]
    assert [each["prediction"]["index"] for each in facts["examples"]] == [each.index for each in answer.predictions]
    assert facts["examples"][0]["geometry"] == dataclasses.asdict(answer.geometry[0])
    provenance = dataclasses.asdict(answer.provenance)
    lists = {name: list(fact) for name, fact in provenance.items() if isinstance(fact, tuple)}
    assert facts["provenance"] == provenance | lists
    assert facts["timing"] == dataclasses.asdict(answer.timing)
    assert facts["failures"] == []


def test_an_answer_with_failures_is_saved_without_their_overlays(
    client: sidelight.Client, floats: torch.Tensor, tmp_path: Path
) -> None:
    broken = floats.clone()
    broken[1, 0, 0, 0] = math.inf
    client.attribute(broken, on_error="return").save(str(tmp_path))
    assert sorted(each.name for each in tmp_path.glob("*.png")) == ["000.png", "002.png", "003.png", "004.png"]
    facts = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert set(facts["examples"][1].values()) == {None}
    assert facts["example_count"] == 5
    (failure,) = facts["failures"]
    assert (failure["example"], failure["code"]) == (1, 3)
