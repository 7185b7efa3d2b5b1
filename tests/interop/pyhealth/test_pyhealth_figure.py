"""The drop-in class's figure, by a real pyplot without a display."""

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from sidelight.pyhealth import BasicGradientSaliencyMaps
from torch import Tensor, nn

NAMES = {0: "Normal", 1: "COVID", 2: "Pneumonia"}
N = 4


class Bright(nn.Module):
    """A model whose class is the index of the picture's bright column, and whose map is that column."""

    def __init__(self) -> None:
        super().__init__()
        self.n_runs = 0

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        self.n_runs += 1
        return {"y_prob": image.mean(dim=(1, 2)).softmax(dim=1)}


@pytest.fixture(autouse=True)
def _without_a_display() -> Iterator[None]:
    with mpl.rc_context():
        plt.switch_backend("Agg")
        yield
        plt.close("all")


def pictures(channels: int = 1, *, n_columns: int = 3, scale: float = 1.0) -> Tensor:
    """Return pictures [N, C, 2, n_columns]; in picture i, column i % n_columns is bright: its class."""
    lit = torch.zeros(N, channels, 2, n_columns)
    for i in range(N):
        lit[i, ..., i % n_columns] = scale
    return lit


def explained(labels: Any = None, **options: Any) -> BasicGradientSaliencyMaps:
    with BasicGradientSaliencyMaps(Bright(), [pictures(**options), labels]) as saliency:
        return saliency


def test_the_figure_is_drawn_as_the_original_draws_it() -> None:
    saliency = explained([0, 1, 2, 0], channels=1)
    figure = saliency.visualize_saliency_map(plt, image_index=1, alpha=0.4)
    (axes,) = figure.axes
    picture, map_ = axes.images
    assert tuple(figure.get_size_inches()) == (15, 7)
    assert not axes.axison
    assert axes.get_title() == ""
    assert (picture.get_cmap().name, map_.get_cmap().name, map_.get_alpha()) == ("gray", "hot", 0.4)
    np.testing.assert_array_equal(picture.get_array(), pictures()[1, 0])
    np.testing.assert_array_equal(map_.get_array(), saliency.Batch_saliency_maps[0]["saliency"][1])
    assert plt.fignum_exists(figure.number)  # the caller's pyplot keeps it


@pytest.mark.parametrize(
    ("options", "title"),
    [
        ({"id2label": NAMES}, "True: Normal, Predicted: COVID"),
        ({"id2label": NAMES, "title": "Scan"}, "Scan - True: Normal, Predicted: COVID"),
        ({"title": "Scan"}, "Scan"),
        ({}, ""),
        ({"id2label": {1: "COVID"}}, "True: 0, Predicted: COVID"),
        ({"id2label": {0: "Normal"}}, "True: Normal, Predicted: 1"),
        ({"id2label": {}}, "True: 0, Predicted: 1"),
        ({"id2label": ["Normal", "COVID"]}, "True: Normal, Predicted: COVID"),
    ],
    ids=str,
)
def test_the_title_names_what_is_known(options: dict[str, Any], title: str) -> None:
    figure = explained(torch.tensor([2, 0, 1, 1])).visualize_saliency_map(plt, image_index=1, **options)
    assert figure.axes[0].get_title() == title


@pytest.mark.parametrize(
    ("labels", "true"),
    [
        (torch.tensor([0, 2, 1, 0]), "True: Pneumonia, "),
        (torch.tensor([[0], [2], [1], [0]]), "True: Pneumonia, "),
        (torch.tensor([[0.0], [1.0], [0.0], [1.0]]), "True: COVID, "),
        (torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0]]), "True: COVID + Pneumonia, "),
        (torch.tensor([[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]]), "True: none, "),
        (np.array([0, 2, 1, 0]), "True: Pneumonia, "),
        ([0, 2, 1, 0], "True: Pneumonia, "),
        ([torch.tensor(0), torch.tensor(2), torch.tensor(1), torch.tensor(0)], "True: Pneumonia, "),
        (["a", "b", "c", "d"], "True: b, "),
        ([0], ""),
        (torch.zeros(N, 2, 3), ""),
        (None, ""),
    ],
    ids=[
        "tensor", "column", "floats", "multi-hot", "multi-hot of none", "array", "list", "list of tensors", "words",
        "too few", "masks", "none",
    ],
)  # fmt: skip
def test_labels_may_have_any_form(labels: Any, true: str) -> None:
    figure = explained(labels).visualize_saliency_map(plt, image_index=1, id2label=NAMES)
    assert figure.axes[0].get_title() == f"{true}Predicted: COVID"


@pytest.mark.parametrize("form", ["dictionary", "list", "tuple", "tensor"])
def test_every_form_of_batch_is_drawn(form: str) -> None:
    images = pictures()
    given: Any = {
        "dictionary": {"image": images, "disease": torch.tensor([1] * N)},
        "list": [images, torch.tensor([1] * N)],
        "tuple": (images, torch.tensor([1] * N)),
        "tensor": images,
    }[form]
    with BasicGradientSaliencyMaps(Bright(), given) as saliency:
        figure = saliency.visualize_saliency_map(plt, image_index=2, id2label=NAMES)
    true = "" if form == "tensor" else "True: COVID, "
    assert figure.axes[0].get_title() == f"{true}Predicted: Pneumonia"


@pytest.mark.parametrize(("n_classes", "predicted"), [(0, ["off", "on"])], ids=["binary"])
def test_a_binary_model_names_the_predicted_side(n_classes: int, predicted: list[str]) -> None:
    class Binary(nn.Module):
        def forward(self, image: Tensor) -> dict[str, Tensor]:
            return {"y_prob": (image.sum(dim=(1, 2, 3)) - 1).sigmoid()[:, None]}

    images = torch.stack([torch.zeros(1, 2, 3), torch.ones(1, 2, 3)])
    with BasicGradientSaliencyMaps(Binary(), [images, torch.tensor([[0.0], [1.0]])]) as saliency:
        titles = [
            saliency.visualize_saliency_map(plt, image_index=i, id2label=predicted).axes[0].get_title()
            for i in range(2)
        ]
    assert titles == ["True: off, Predicted: off", "True: on, Predicted: on"]


def test_what_was_stored_is_drawn_and_the_model_does_not_run_again() -> None:
    """Even if the model, the batch or the history has changed."""
    images = pictures()
    with BasicGradientSaliencyMaps(Bright(), [images, [0] * N]) as saliency:
        expected = saliency.Batch_saliency_maps[0]["saliency"].clone()
    images.zero_()
    saliency.clear()
    figure = saliency.visualize_saliency_map(plt, image_index=-1, id2label=NAMES)
    assert figure.axes[0].get_title() == "True: Normal, Predicted: Normal"
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), pictures()[3, 0])
    np.testing.assert_array_equal(figure.axes[0].images[1].get_array(), expected[3])


@pytest.mark.parametrize("index", [N, -N - 1, 10**30, "one", 1.0, None, slice(2)], ids=str)
def test_an_index_outside_the_batch_is_refused(index: Any) -> None:
    with pytest.raises((IndexError, ValueError), match="image_index: got"):
        explained().visualize_saliency_map(plt, image_index=index)
    assert not plt.get_fignums()


def test_without_a_batch_there_is_nothing_to_draw() -> None:
    with BasicGradientSaliencyMaps(Bright()) as saliency:
        saliency.attribute(save_to_batch=True, image=pictures())
        with pytest.raises(ValueError, match="no input_batch"):
            saliency.visualize_saliency_map(plt, image_index=0)


def test_a_pyplot_that_it_imported_itself_keeps_no_figure() -> None:
    figure = explained().visualize_saliency_map(None, image_index=0, title="Scan")
    assert figure.axes[0].get_title() == "Scan"
    assert not plt.get_fignums()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, -3.0, 200.0])
def test_pictures_of_any_kind_are_drawn_without_a_warning(channels: int, dtype: torch.dtype, scale: float) -> None:
    images = pictures(channels, scale=scale).to(dtype)
    with BasicGradientSaliencyMaps(Bright(), images) as saliency:
        drawn = saliency.visualize_saliency_map(plt, image_index=0).axes[0].images[0].get_array()
    if channels == 3:
        assert drawn.shape == (2, 3, 3)
        assert (drawn.min(), drawn.max()) == (0, 1)
    else:
        np.testing.assert_array_equal(drawn, images[0].double().mean(dim=0))


def test_a_picture_of_one_color_beyond_the_range_is_drawn() -> None:
    with BasicGradientSaliencyMaps(Bright(), torch.full((1, 3, 2, 3), 7.0)) as saliency:
        drawn = saliency.visualize_saliency_map(plt, image_index=0).axes[0].images[0].get_array()
    assert np.isfinite(drawn).all()
