"""A drop-in replacement for PyHealth's `BasicGradientSaliencyMaps`, with a server or an engine in this process.

Change one import: `from sidelight.pyhealth import BasicGradientSaliencyMaps`. Unlike the rest of the client, this
package needs torch. To use a torch module as the model, it also needs the extra `sidelight[server]`.
"""

import operator
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .._clients.client import Client, connect
from .._clients.core import CONNECT_TIMEOUT_S, TIMEOUT_S
from .._inputs.validation import whole
from . import figure
from .backends import Classes, Local, Remote

try:
    import torch
    from torch import Tensor, nn
except ModuleNotFoundError:
    raise ImportError("sidelight.pyhealth needs torch: pip install 'sidelight[server]'") from None

MAX_HISTORY = 64

Record = dict[str, Any]


class BasicGradientSaliencyMaps:
    """Saliency maps of an image model: the gradient of the predicted probability, the maximum |value| over channels.

    `model` is a `sidelight.Client`, an address, or a torch module. A module runs in this process on its own device, in
    eval mode, with one batch per call. The module itself is not frozen, moved or switched to eval mode, and the next
    map uses its current weights. `served_model` selects a model of a server with several.

    `input_batch` is a dictionary, a list or tuple of images and labels, or only images. The constructor explains it.
    `Batch_saliency_maps` keeps the newest `max_history` records. Thread-safe. Call `close`, or use `with`.

    A failed call raises `sidelight.SidelightError`; a module that cannot be explained raises `ValueError`.
    """

    def __init__(
        self,
        model: "Client | str | nn.Module",
        input_batch: "Mapping[str, Any] | Sequence[Any] | Tensor | None" = None,
        image_key: str = "image",
        label_key: str = "disease",
        *,
        served_model: str | None = None,
        max_history: int = MAX_HISTORY,
        timeout: float = TIMEOUT_S,
    ) -> None:
        batch = _batch(input_batch, image_key, label_key)
        if whole(max_history, "max_history") < 1:
            raise ValueError(f"max_history: got {max_history}, expected at least 1")
        self._explainer = _explainer(model, image_key, label_key, served_model=served_model, timeout_s=timeout)
        self.model = self.Model = model
        self.Input_batch = input_batch
        self.Image_key = image_key
        self.Label_key = label_key
        self.Batch_saliency_maps: list[Record] = []
        self._max_history = max_history
        self._recording = threading.Lock()
        self._input: _Explained | None = None
        if batch is not None:
            try:
                self._input = self._explain(batch, None)
                self._record(self._input)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __call__(self, **data: Any) -> dict[str, Tensor]:
        return self.attribute(**data)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={type(self.model).__name__})"

    def attribute(
        self, save_to_batch: bool = False, target_class_idx: "int | Sequence[int] | Tensor | None" = None, **data: Any
    ) -> dict[str, Tensor]:
        """Return `{image_key: maps}` for images [N, C, H, W]: maps [N, H, W] with the images' type and device.

        `target_class_idx` is one class, or one per example; None is the predicted class. Labels and other data are
        ignored. `save_to_batch` appends a record to `Batch_saliency_maps`.
        """
        explained = self._explain(data, _classes(target_class_idx))
        if save_to_batch:
            self._record(explained)
        return {self.Image_key: explained.saliency}

    def get_gradient_saliency_maps(self) -> list[Record]:
        """Return the records, each with `saliency`, `image` and `label` of a batch."""
        return self.Batch_saliency_maps

    def clear(self) -> None:
        """Delete the records. The input batch can still be drawn."""
        with self._recording:
            self.Batch_saliency_maps.clear()

    def visualize_saliency_map(
        self,
        plt: Any,
        *,
        image_index: int,
        title: str | None = None,
        id2label: "figure.Names | None" = None,
        alpha: float = 0.3,
    ) -> Any:
        """Draw one image of the input batch with its map, and return the figure.

        `plt` is pyplot; with None it is imported, and the figure is closed after it is shown. `id2label` adds the true
        and the predicted class to the title. The map is not recomputed.
        """
        shown = self._input
        if shown is None:
            raise ValueError("there is no input_batch to draw: pass one to the constructor")
        index = _index(image_index, len(shown.image))
        return figure.draw(
            plt,
            _host(shown.image[index]),
            _host(shown.saliency[index]),
            title=figure.titled(
                title, true=figure.label_of(shown.label, index), predicted=shown.predicted[index], names=id2label
            ),
            alpha=alpha,
        )

    def close(self) -> None:
        """Close the engine, or a client that the constructor opened. A client that was passed in stays open."""
        self._explainer.close()

    def _explain(self, data: Mapping[str, Any], classes: Classes) -> "_Explained":
        images = _images(data, self.Image_key)
        label = data.get(self.Label_key)
        maps, predicted = self._explainer.explain(_host(images), classes)
        return _Explained(
            saliency=torch.from_numpy(np.array(maps)).to(images.device, images.dtype),
            image=images.detach().clone(),
            label=label.detach() if isinstance(label, Tensor) else label,
            predicted=predicted,
        )

    def _record(self, explained: "_Explained") -> None:
        record = {"saliency": explained.saliency, "image": explained.image, "label": explained.label}
        with self._recording:
            self.Batch_saliency_maps.append(record)
            del self.Batch_saliency_maps[: -self._max_history]


@dataclass(frozen=True, slots=True)
class _Explained:
    """One batch and its maps."""

    saliency: Tensor  # [N, H, W]
    image: Tensor  # [N, C, H, W]
    label: Any
    predicted: list[int]


def _explainer(
    model: object, image_key: str, label_key: str, *, served_model: str | None, timeout_s: float
) -> Local | Remote:
    if isinstance(model, Client):
        return Remote(model, served_model, owned=False, timeout_s=timeout_s)
    if isinstance(model, str):
        client = connect(model, connect_timeout=min(timeout_s, CONNECT_TIMEOUT_S))
        return Remote(client, served_model, owned=True, timeout_s=timeout_s)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: got {type(model).__name__}, expected a sidelight.Client, an address or a torch.nn.Module"
        )
    if served_model is not None:
        raise ValueError(f"served_model: got {served_model!r}, expected None: it applies only to a server")
    import sidelight_server
    from sidelight_server.app import in_process

    return Local(sidelight_server, in_process, model, image_key, label_key)


def _batch(given: object, image_key: str, label_key: str) -> Mapping[str, Any] | None:
    if given is None:
        return None
    if isinstance(given, list | tuple) and given:
        given = {image_key: given[0], label_key: given[1] if len(given) > 1 else None}
    if isinstance(given, Tensor):
        given = {image_key: given}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"input_batch: got {type(given).__name__}, expected a dictionary, a list or tuple of images and labels, "
            "a tensor or None"
        )
    _images(given, image_key)
    return given


def _images(data: Mapping[str, Any], key: str) -> Tensor:
    if key not in data:
        raise KeyError(f"{key}: the batch has no such key; got {', '.join(map(str, data)) or 'nothing'}")
    images = data[key]
    if not isinstance(images, Tensor):
        raise ValueError(f"{key}: got {type(images).__name__}, expected a floating tensor [N, C, H, W]")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"{key}: got {images.dtype} {list(images.shape)}, expected a floating tensor [N, C, H, W]")
    return images


def _classes(given: Any) -> Classes:
    if to_list := getattr(given, "tolist", None):
        given = to_list()
    if given is None:
        return None
    if isinstance(given, Sequence) and not isinstance(given, str):
        return [whole(each, "target_class_idx", bits=64) for each in given]
    return whole(given, "target_class_idx", bits=64)


def _index(image_index: Any, n: int) -> int:
    try:
        index = operator.index(image_index)
    except TypeError:
        raise ValueError(f"image_index: got {image_index!r}, expected a whole number") from None
    if not -n <= index < n:
        raise IndexError(f"image_index: got {index}, the batch has {n} images")
    return index % n


def _host(tensor: Tensor) -> NDArray[Any]:
    host = tensor.detach().cpu()
    return (host if host.dtype == torch.float64 else host.float()).numpy()
