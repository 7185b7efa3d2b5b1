"""Scores: the numbers that are differentiated, out of a model's outputs."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .attribution import Score

Outputs = Literal["logits", "probabilities"]  # what a model returns

# A probability's gradient carries the factor p (1 − p). Where that is below this, float32 has lost most of it.
SATURATION = 1e-6

_LOGITS: dict[Score, Callable[[Tensor], Tensor]] = {
    Score.PROBABILITY: lambda outputs: torch.softmax(outputs, dim=1),
    Score.LOGIT: lambda outputs: outputs,
    Score.LOG_PROBABILITY: lambda outputs: torch.log_softmax(outputs, dim=1),
}
_PROBABILITIES: dict[Score, Callable[[Tensor], Tensor]] = {
    Score.PROBABILITY: lambda outputs: outputs,
    Score.LOG_PROBABILITY: torch.log,
}
_BY_OUTPUTS = {"logits": _LOGITS, "probabilities": _PROBABILITIES}


def available(outputs: Outputs) -> tuple[Score, ...]:
    """Return the scores that a model with such outputs can give."""
    return tuple(_BY_OUTPUTS[outputs])


def probabilities(values: Tensor, outputs: Outputs) -> Tensor:
    """Return the probabilities, [n, K], of a model's outputs, [n, K]."""
    return _BY_OUTPUTS[outputs][Score.PROBABILITY](values)


def select(values: Tensor, targets: Tensor, scores: Sequence[Score], outputs: Outputs) -> Tensor:
    """Return each row's own score, [n], of its own target: outputs [n, K], targets [n]."""
    of = _BY_OUTPUTS[outputs]
    if len(set(scores)) == 1:
        return of[scores[0]](values).gather(1, targets[:, None])[:, 0]
    selected = values.new_empty(len(scores))
    for score in dict.fromkeys(scores):
        rows = torch.tensor([row for row, each in enumerate(scores) if each is score], device=values.device)
        picked = of[score](values[rows]).gather(1, targets[rows, None])[:, 0]
        selected = selected.index_put((rows,), picked)
    return selected
