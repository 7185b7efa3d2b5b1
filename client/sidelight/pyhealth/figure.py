"""Figures: an image with its map, drawn with matplotlib's pyplot and titled as in PyHealth."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Names = Mapping[Any, object] | Sequence[object]  # class names by index

FIGURE_INCHES = (15, 7)


def draw(plt: Any, picture: Floats, map_: Floats, *, title: str | None, alpha: float) -> Any:
    """Draw a map, [H, W], over a picture, [C, H, W], and return the figure; `plt` as in `visualize_saliency_map`."""
    own = plt is None
    if own:
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise ImportError("plt: got None, but matplotlib is not installed: pip install 'sidelight[plot]'") from None
    figure = plt.figure(figsize=FIGURE_INCHES)
    plt.axis("off")
    plt.imshow(_for_imshow(picture), cmap="gray")
    plt.imshow(map_, cmap="hot", alpha=alpha)
    if title:
        plt.title(title)
    plt.show()
    if own:
        plt.close(figure)
    return figure


def titled(title: str | None, *, true: object, predicted: int, names: Names | None) -> str | None:
    """Return the title, with the true and the predicted class if `names` are given."""
    if names is None:
        return title
    classes = f"Predicted: {_name(predicted, names)}"
    if true is not None:
        classes = f"True: {_name(true, names)}, {classes}"
    return classes if title is None else f"{title} - {classes}"


def label_of(labels: Any, example: int) -> object:
    """Return an example's class, or a list of its classes; None if the labels have another form.

    `labels` is a tensor, an array or a list with one entry per example: a class, [class], or a multi-hot vector.
    """
    one = labels
    if isinstance(labels, list | tuple) or getattr(labels, "ndim", 0) > 0:
        try:
            one = labels[example]
        except IndexError:
            return None
    if to_list := getattr(one, "tolist", None):
        one = to_list()
    while isinstance(one, list | tuple) and len(one) == 1:
        (one,) = one
    if not isinstance(one, list | tuple):
        return one
    if any(isinstance(each, list | tuple) for each in one):  # such as a segmentation mask
        return None
    return [each if isinstance(each, str) else index for index, each in enumerate(one) if each]


def _name(label: Any, names: Names) -> str:
    if isinstance(label, list):
        return " + ".join(_name(each, names) for each in label) or "none"
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    try:
        return str(names[label])
    except (KeyError, IndexError, TypeError):  # a class without a name
        return str(label)


def _for_imshow(picture: Floats) -> Floats:
    """Return a picture, [C, H, W], for `imshow`: gray values, or RGB in 0…1."""
    if len(picture) != 3:
        gray: Floats = np.mean(picture, axis=0)  # [H, W]
        return gray
    low, high = picture.min(initial=0.0), picture.max(initial=1.0)
    if low < 0 or high > 1:  # normalized for a model: matplotlib would clip it
        low, high = picture.min(), picture.max()
        picture = (picture - low) / max(high - low, np.finfo(picture.dtype).tiny)
    drawn: Floats = np.moveaxis(picture, 0, -1)  # [H, W, C]
    return drawn
