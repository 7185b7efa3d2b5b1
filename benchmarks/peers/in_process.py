"""Peers without a server: the original class, and Captum. One batch at a time, in a process of their own.

Run in sidelight's environment.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.support.nets import resnet18
from benchmarks.support.original import PyHealthModel, original_class

from .driver import IMAGES, Answer, Image, Loop, drive
from .rival import arguments
from .saliency import Captum, Explained, Pixels, explained, load, prepared


class Remembering(PyHealthModel):
    """The model as the original expects it. The original does not return its prediction, so this wrapper records it."""

    def forward(self, image: Tensor, disease: Tensor | None = None) -> dict[str, Tensor]:
        self.last = super().forward(image, disease)
        return self.last


class Original:
    """PyHealth's class. It also computes the gradients of all parameters.

    It calls `train()`, which an exported module does not have, so its model is the module from before the export.
    """

    def __init__(self) -> None:
        self.model = Remembering(resnet18().module).eval()
        self.explainer = original_class()(self.model)

    def explain(self, pixels: Pixels) -> Explained:
        maps = self.explainer.attribute(image=prepared(pixels))["image"]
        probabilities, predicted = self.model.last["y_prob"].detach().max(dim=1)
        return explained(maps, predicted, probabilities)


def by_batches(explain: Callable[[Pixels], Explained], images: Sequence[Image], at_once: int) -> Loop:
    """Explain images in batches of `at_once`. The latency of each image is that of its batch."""
    latencies: list[float] = []
    answers: list[Answer] = []
    began = time.perf_counter()
    for first in range(0, len(images), at_once):
        batch_began = time.perf_counter()
        batch = explain(np.stack(images[first : first + at_once]))
        latencies += [time.perf_counter() - batch_began] * len(batch.maps)
        answers += [Answer(map_, int(class_)) for map_, class_ in zip(batch.maps, batch.predicted, strict=True)]
    return Loop(time.perf_counter() - began, latencies, answers)


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(args.threads)
    rival = Original() if args.original else Captum(load(args.folder, threads=args.threads))
    drive(lambda images, at_once: by_batches(rival.explain, images, at_once), np.load(args.folder / IMAGES))


if __name__ == "__main__":
    main()
