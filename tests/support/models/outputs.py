"""Small models that differ in how they are called and in what they return."""

from collections.abc import Callable
from typing import Any

import torch
from sidelight_server import Settings
from torch import Tensor, nn

SIZE = (3, 8, 8)
K = 4
SETTINGS = Settings(device="cpu", threads=1)


class Net(nn.Module):
    """Logits, [N, K], or [N, K, 8, 8] of a dense one."""

    def __init__(self, n_classes: int = K, *, dense: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Conv2d(6, n_classes, 1) if dense else nn.Linear(6 * 64, n_classes)
        self.dense = dense

    def logits(self, x: Tensor) -> Tensor:
        features = self.conv(x).relu()
        return self.head(features if self.dense else features.flatten(1))

    def forward(self, x: Tensor) -> Any:
        return self.logits(x)


class Softmaxed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(dim=1)


class LogSoftmaxed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).log_softmax(dim=1)


class Sigmoid(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).sigmoid()


class OneSide(Net):
    """Binary, without the dimension of classes."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x).sigmoid().squeeze(-1)


class Keyword(Net):
    def forward(self, *, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(pixel_values)


class Configured(Net):
    def forward(self, x: Tensor, scale: float, *, flip: bool) -> Tensor:  # type: ignore[override]
        return self.logits(-x if flip else x) * scale


class Labelled(Net):
    """A model that computes its loss in every pass, with the loss for its kind of label."""

    def __init__(self, kind: str) -> None:
        super().__init__(1 if kind == "binary" else K)
        self.kind = kind

    def forward(self, image: Tensor, disease: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.logits(image)
        if self.kind == "multiclass":
            loss = nn.functional.cross_entropy(logits, disease)
            return {"loss": loss, "y_prob": logits.softmax(dim=1), "y_true": disease}
        loss = nn.functional.binary_cross_entropy_with_logits(logits, disease)
        return {"loss": loss, "y_prob": logits.sigmoid(), "y_true": disease}


class AnyKeyword(Labelled):
    """As PyHealth's models are: its keywords are known by its dataset alone."""

    feature_keys = ["scan"]  # noqa: RUF012
    label_keys = ["finding"]  # noqa: RUF012

    def forward(self, **data: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(data["scan"], data["finding"])


class Returning(Net):
    def __init__(self, of: Callable[[Tensor], Any], n_classes: int = K, *, dense: bool = False) -> None:
        super().__init__(n_classes, dense=dense)
        self.of = of

    def forward(self, x: Tensor) -> Any:
        return self.of(self.logits(x))
