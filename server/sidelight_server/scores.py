"""Scores: the numbers that are differentiated, out of a model's outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attribution import Aim, Score
from .errors import FailedPrecondition, InvalidArgument
from .options import Activation, Outputs

# A probability's gradient carries the factor p (1 − p). Where that is below this, float32 has lost most of it.
SATURATION = 1e-6


def _margin(logits: Tensor) -> Tensor:
    """Return each class's logit minus the largest other one."""
    largest = logits.topk(2, dim=1).values  # [n, 2, …]
    first, second = largest[:, :1], largest[:, 1:]
    index = logits.detach().argmax(dim=1, keepdim=True)
    is_first = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index, True)
    return logits - torch.where(is_first, second, first)


_Scores = dict[Score, Callable[[Tensor], Tensor]]

_SOFTMAX: _Scores = {
    Score.PROBABILITY: lambda logits: torch.softmax(logits, dim=1),
    Score.LOGIT: lambda logits: logits,
    Score.LOG_PROBABILITY: lambda logits: torch.log_softmax(logits, dim=1),
    Score.MARGIN: _margin,
}
_SIGMOID = _SOFTMAX | {Score.PROBABILITY: torch.sigmoid, Score.LOG_PROBABILITY: nn.functional.logsigmoid}
_PROBABILITIES: _Scores = {Score.PROBABILITY: lambda outputs: outputs, Score.LOG_PROBABILITY: torch.log}


@dataclass(frozen=True, slots=True)
class Head:
    """How a model's outputs are read: [n, K], or [n, K, h, w] of a model that answers for each pixel.

    A single output, K = 1, has two sides: class 1 is what it speaks for, class 0 what it speaks against.
    """

    outputs: Outputs = "logits"
    activation: Activation = "softmax"

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores that can be had of such outputs."""
        return tuple(self._of(n_outputs=2))

    def sides(self, values: Tensor) -> Tensor:
        """Return outputs with a column for each class."""
        if values.shape[1] > 1:
            return values
        other = -values if self.outputs == "logits" else 1 - values
        return torch.cat([other, values], dim=1)

    def probabilities(self, values: Tensor) -> Tensor:
        """Return the probabilities, [n, K], of outputs; of dense ones their mean over the pixels."""
        probable = self._of(values.shape[1])[Score.PROBABILITY](self.sides(values))
        return probable.mean(dim=(2, 3)) if probable.ndim == 4 else probable

    def predicted(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """Return the predicted classes, [n]: the largest output, or of a single one the side from 0.5 on."""
        if values.ndim == 4:
            return probabilities.argmax(dim=1)
        if values.shape[1] == 1:
            return (values[:, 0] >= (0 if self.outputs == "logits" else 0.5)).long()
        return values.argmax(dim=1)

    def select(self, values: Tensor, classes: Tensor, aims: Sequence[Aim], scores: Sequence[Score]) -> Tensor:
        """Return each row's own score, [n], of its own classes, [n], for outputs [n, K] or [n, K, h, w]."""
        of, sides = self._of(values.shape[1]), self.sides(values)
        own = _largest(values) if any(aim.each_pixel for aim in aims) else None
        if len(set(scores)) == 1:
            return _picked(of[scores[0]](sides), classes, aims, own)
        selected = values.new_empty(len(scores))
        for score in dict.fromkeys(scores):
            places = [place for place, each in enumerate(scores) if each is score]
            rows = torch.tensor(places, device=values.device)
            picked = _picked(
                of[score](sides[rows]),
                classes[rows],
                [aims[place] for place in places],
                None if own is None else own[rows],
            )
            selected = selected.index_put((rows,), picked)
        return selected

    def _of(self, n_outputs: int) -> _Scores:
        if self.outputs == "probabilities":
            return _PROBABILITIES
        return _SIGMOID if self.activation == "sigmoid" or n_outputs == 1 else _SOFTMAX


def _largest(values: Tensor) -> Tensor:
    """Return the class, [n, 1, h, w], of each pixel's largest output; a single one speaks for class 1 everywhere."""
    return values.detach().argmax(dim=1, keepdim=True) + int(values.shape[1] == 1)


def _picked(scored: Tensor, classes: Tensor, aims: Sequence[Aim], own: Tensor | None) -> Tensor:
    """Return the scores, [n], that aims mean: of a class, minus those of another, over a region."""
    if scored.ndim == 4:
        scored = _over_regions(scored, aims, own)  # [n, K]
    elif any(aim.region for aim in aims):
        raise FailedPrecondition("target.dense.region: the model answers for the whole picture, not for each pixel")
    picked = scored.gather(1, classes[:, None])[:, 0]
    if all(aim.negative is None for aim in aims):
        return picked
    largest = scored.shape[1] - 1
    others = torch.tensor([min(aim.negative or 0, largest) for aim in aims], device=scored.device)
    counts = torch.tensor([aim.negative is not None for aim in aims], device=scored.device)
    return picked - scored.gather(1, others[:, None])[:, 0] * counts


def _over_regions(scored: Tensor, aims: Sequence[Aim], own: Tensor | None) -> Tensor:
    n_classes, height, width = scored.shape[1:]
    rows = []
    for place, (row, aim) in enumerate(zip(scored, aims, strict=True)):  # [K, h, w]
        if aim.each_pixel and own is not None:
            row = row.gather(0, own[place])  # [1, h, w]
        if (region := aim.region) is not None:
            if region.top + region.height > height or region.left + region.width > width:
                raise InvalidArgument(
                    f"target.dense.region: it ends at [{region.top + region.height}, {region.left + region.width}], "
                    f"the model's output is [{height}, {width}]"
                )
            row = row[:, region.top : region.top + region.height, region.left : region.left + region.width]
        rows.append(row.sum(dim=(1, 2)).expand(n_classes))
    return torch.stack(rows)
