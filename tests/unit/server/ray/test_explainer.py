"""The explainer of Ray Data, on batches as Ray passes them: the columns that it adds, and faults that it survives."""

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sidelight
import sidelight_server
from numpy.typing import NDArray
from PIL import Image
from sidelight_server import ConfigurationError, ModelSpec
from sidelight_server.ray import Explainer

from support.models import LABELS, Linear, small_cnn
from support.tolerances import NEIGHBORS

ADDED = {
    "map",
    "predicted",
    "predicted_label",
    "probability",
    "target",
    "score",
    "convergence_error",
    "completeness_error",
    "failure",
    "example_digest",
    "provenance",
}


def sized() -> ModelSpec:
    return ModelSpec(small_cnn(), input_size=(3, 32, 32), class_names=LABELS, name="small")


def explainer(**options: object) -> Explainer:
    return Explainer(**{"model": sized(), "threads": 1, "device": "cpu"} | options)


def column(*values: object) -> NDArray[np.object_]:
    """Return values as Ray gives a column that is no tensor."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def pixels(seed: int, *, height: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, 32, 3), np.uint8)


def png(seed: int, **shape: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed, **shape)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def explain() -> Explainer:
    return explainer()


@pytest.fixture(scope="module")
def client() -> Iterator[sidelight.Client]:
    with sidelight_server.serve(sized(), threads=1, device="cpu") as address, sidelight.connect(address) as client:
        yield client


def test_a_row_is_what_a_server_answers(explain: Explainer, client: sidelight.Client) -> None:
    rows, answer = (
        explain({"bytes": column(png(0), png(1)), "id": np.array([7, 8])}),
        client.attribute([png(0), png(1)]),
    )
    assert rows.keys() == ADDED | {"bytes", "id"}
    assert list(rows["id"]) == [7, 8]
    np.testing.assert_allclose(rows["map"], answer.maps, rtol=0, atol=NEIGHBORS * answer.maps.max())
    assert list(rows["predicted"]) == [each.index for each in answer.predictions]
    assert list(rows["predicted_label"]) == [each.label for each in answer.predictions]
    assert list(rows["target"]) == [each.index for each in answer.targets]
    np.testing.assert_allclose(rows["probability"], [each.probability for each in answer.predictions], rtol=1e-6)
    assert list(rows["example_digest"]) == [hashlib.sha256(png(seed)).hexdigest() for seed in (0, 1)]
    assert list(rows["failure"]) == ["", ""]


def test_files_paths_and_pixels_of_one_picture_have_one_map(explain: Explainer, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(png(0))
    given = (png(0), str(tmp_path / "picture.png"), pixels(0))
    maps = explain({"bytes": column(*given)})["map"]
    np.testing.assert_allclose(maps, np.stack([maps[0]] * 3), rtol=0, atol=NEIGHBORS * maps.max())


def test_a_tensor_column_of_the_models_own_input_is_explained() -> None:
    module = Linear(shape=(3, 4, 5))
    floats = np.random.default_rng(0).standard_normal((2, 3, 4, 5), np.float32)
    rows = explainer(model=module, target=3, score="logit", channels="none")({"image": floats})
    expected = module.linear.weight[3].detach().numpy().reshape(3, 4, 5)
    np.testing.assert_allclose(rows["map"], np.stack([expected] * 2), rtol=1e-6)


def test_bad_images_are_rows_with_a_failure_beside_good_ones(explain: Explainer) -> None:
    bad = [b"no picture", "/nonexistent.png", None, np.zeros((2, 2)), 5]
    rows = explain({"image": column(png(0), *bad, pixels(1, height=40))})
    good = explain({"image": column(png(0), pixels(1, height=40))})
    assert [bool(each) for each in rows["failure"]] == [False, True, True, True, True, True, False]
    assert "No such file or directory" in rows["failure"][2]
    assert np.isnan(rows["map"][1:6]).all()
    assert list(rows["predicted"][1:6]) == [-1] * 5
    np.testing.assert_allclose(rows["map"][[0, 6]], good["map"], rtol=0, atol=NEIGHBORS * good["map"].max())


def test_a_batch_without_one_good_image_has_the_shape_of_the_others() -> None:
    for options, shape in (({}, (1, 32, 32)), ({"target": sidelight.TopK(2), "channels": "none"}, (1, 2, 3, 32, 32))):
        rows = explainer(**options)({"bytes": column(b"no picture")})
        assert rows["map"].shape == shape
        assert rows["target"].shape == shape[:-2][: 1 + (len(shape) == 5)]


def test_each_row_may_have_a_target_and_an_unknown_one_fails_alone() -> None:
    rows = explainer(target_column="class")({"bytes": column(png(0), png(1), png(2)), "class": column("dog", "owl", 6)})
    assert list(rows["target"]) == [LABELS.index("dog"), -1, 6]
    assert "owl" in rows["failure"][1]
    assert list(rows["failure"][[0, 2]]) == ["", ""]


def test_small_maps_times_their_scale_are_the_maps(explain: Explainer) -> None:
    batch = {"bytes": column(png(0), b"no picture", png(1))}
    maps, small = explain(batch)["map"], explainer(map_dtype="uint8")(batch)
    assert small["map"].dtype == np.uint8
    scale = small["map_scale"][[0, 2], None, None]
    assert np.isnan(small["map_scale"][1])
    # Half a unit of rounding, and the two engines' own difference.
    assert (np.abs(small["map"][[0, 2]] * scale - maps[[0, 2]]) <= (0.5 + 255 * NEIGHBORS) * scale).all()


def test_threads_may_call_it_at_once(explain: Explainer) -> None:
    batches = [{"bytes": column(png(seed), png(seed + 1))} for seed in range(8)]
    alone = [explain(batch)["map"] for batch in batches]
    with ThreadPoolExecutor(8) as threads:
        together = [rows["map"] for rows in threads.map(explain, batches)]
    np.testing.assert_allclose(together, alone, rtol=0, atol=NEIGHBORS * np.max(alone))


def test_a_provenance_is_a_file_named_by_its_digest(tmp_path: Path) -> None:
    method = sidelight.IntegratedGradients(steps=3)
    rows = explainer(method=method, provenance=tmp_path / "all")({"bytes": column(png(0))})
    (file,) = (tmp_path / "all").iterdir()
    assert file.stem == hashlib.sha256(file.read_bytes()).hexdigest() == rows["provenance"][0]
    assert json.loads(file.read_bytes())["method"]["integrated_gradients"]["steps"] == 3
    assert np.isfinite(rows["completeness_error"]).all()


@pytest.mark.parametrize(
    ("options", "error", "pattern"),
    [
        ({"method": "gradiant"}, sidelight.exceptions.InvalidArgument, "did you mean 'gradient'"),
        ({"method": "grad_cam(layer=nowhere)"}, sidelight_server.SidelightError, "nowhere"),
        ({"target": "owl"}, sidelight_server.SidelightError, "owl"),
        ({"model": "python:nowhere:net"}, ConfigurationError, "nowhere"),
        ({"thread": 1}, ConfigurationError, "threads"),
    ],
)
def test_wrong_options_raise_when_it_is_made(options: dict[str, object], error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        explainer(**options)


def test_a_missing_column_is_named(explain: Explainer) -> None:
    with pytest.raises(ConfigurationError, match='no "image" in the data set, whose columns are picture'):
        explain({"picture": column(png(0))})
