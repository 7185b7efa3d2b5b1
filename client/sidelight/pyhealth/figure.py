"""Figures: an image with its map over it, by matplotlib's pyplot, with titles as PyHealth writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Names = Mapping[Any, object] | Sequence[object]  # of classes, by their number

FIGURE_INCHES = (15, 7)


def draw(plt: Any, picture: Floats, map_: Floats, *, title: str | None, alpha: float) -> Any:
    """Draw a map, [H, W], over a picture, [C, H, W], and return the figure.

    `plt` is pyplot; where it is None it is imported here, and the figure is closed once it was shown.
    """
    own = plt is None
    if own:
        plt = _pyplot()
    figure = plt.figure(figsize=FIGURE_INCHES)
    plt.axis("off")
    plt.imshow(_seen(picture), cmap="gray")
    plt.imshow(map_, cmap="hot", alpha=alpha)
    if title:
        plt.title(title)
    plt.show()
    if own:
        plt.close(figure)
    return figure


def titled(title: str | None, *, true: object, predicted: int, names: Names | None) -> str | None:
    """Return the title, with the names of the true and the predicted class where names are given."""
    if names is None:
        return title
    told = f"Predicted: {_name(predicted, names)}"
    if true is not None:
        told = f"True: {_name(true, names)}, {told}"
    return told if title is None else f"{title} - {told}"


def label_of(labels: Any, example: int) -> object:
    """Return an example's class, or the list of its classes, as a batch of any form tells it; None: it does not.

    `labels` is a tensor, an array or a list of N: of classes, of [class], or multi-hot.
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
    if any(isinstance(each, list | tuple) for each in one):  # a mask, say
        return None
    return [each if isinstance(each, str) else place for place, each in enumerate(one) if each]


def _name(label: Any, names: Names) -> str:
    if isinstance(label, list):
        return " + ".join(_name(each, names) for each in label) or "none"
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    try:
        return str(names[label])
    except (KeyError, IndexError, TypeError):  # what is no key, or no place, is its own name
        return str(label)


def _seen(picture: Floats) -> Floats:
    """Return what is drawn of a picture, [C, H, W]: grey values, or RGB in 0…1."""
    if len(picture) != 3:
        grey: Floats = np.mean(picture, axis=0)  # [H, W]
        return grey
    low, high = picture.min(initial=0.0), picture.max(initial=1.0)
    if low < 0 or high > 1:  # normalised for a model: as RGB, matplotlib would clip it
        low, high = picture.min(), picture.max()
        picture = (picture - low) / max(high - low, np.finfo(picture.dtype).tiny)
    drawn: Floats = np.moveaxis(picture, 0, -1)  # [H, W, C]
    return drawn


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("plt: got None, and matplotlib is not installed: pip install 'sidelight[plot]'") from None
    return plt
