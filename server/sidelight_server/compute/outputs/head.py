"""The head: computes classes, probabilities and scores from a model's outputs, and the scores' gradients at them.

Scores and gradients are computed in float64 (float32 on MPS) from the outputs as the model returned them, except
probabilities that are not near 0 or 1. The gradient of a probability and of its logarithm depends on 1 − p, which for p
near 1 has no digits left in float32.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...config.options import Activation, Outputs
from ...domain import ResolvedTarget, Score
from ...errors import FailedPrecondition
from .target_selection import ScoredRows, over_both, select_targets

# A probability p is computed in float32, as torch and Captum do, if log(p / (1 − p)) lies between these bounds: p from
# 9e-27 to 0.982. Within them, the error of its gradient at the outputs is at most 6e-5 of the gradient's norm (the
# worst of 20,000 random rows of 2, 10 and 1,000 classes each, against float64; the median is 1e-5). With an upper bound
# of 8 the error would be 3e-3; with 15 no digit would be right.
LEAST_LOG_ODDS, MOST_LOG_ODDS = -60.0, 4.0
# A gradient at the outputs whose largest element is below this gives a map of zeros in float32, whose smallest normal
# number is 1e-38. A probability reaches it at log-odds of 66.
DEAD = 2.0**-96
# For a model that returns probabilities: 1 − p below this many steps of the model's type is mostly rounding error.
LOST_STEPS = 8


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
class Scored:
    """Scores and their gradients at the outputs, row by row."""

    scores: Tensor  # [n]
    grad_outputs: Tensor | None  # the gradients at the outputs, in their shape and type; None if not requested
    is_dead: Tensor  # bool, [n]: whether that gradient is numerically zero


@dataclass(frozen=True, slots=True)
class Head:
    """Computes probabilities and scores from outputs: [n, K], or [n, K, h, w] of a dense model.

    A single output, K = 1, is treated as two classes: class 1 is the positive one, class 0 its complement.
    """

    outputs: Outputs = "logits"
    activation: Activation = "softmax"

    @property
    def scores(self) -> tuple[Score, ...]:
        """The scores that can be computed from such outputs."""
        return tuple(self._of(n_outputs=2))

    def sides(self, values: Tensor) -> Tensor:
        """Return outputs with one column per class: two for a single output."""
        if values.shape[1] > 1:
            return values
        other = -values if self.outputs == "logits" else 1 - values
        return torch.cat([other, values], dim=1)

    def probabilities(self, values: Tensor) -> Tensor:
        """Return the probabilities, [n, K]; for dense outputs their mean over the pixels."""
        probable = self._of(values.shape[1])[Score.PROBABILITY](self.sides(values))
        return probable.mean(dim=(2, 3)) if probable.ndim == 4 else probable

    def predicted(self, values: Tensor, probabilities: Tensor) -> Tensor:
        """Return the predicted classes, [n]: the largest output, or for a single one class 1 from p = 0.5 up."""
        if values.ndim == 4:
            return probabilities.argmax(dim=1)
        if values.shape[1] == 1:
            return (values[:, 0] >= (0 if self.outputs == "logits" else 0.5)).long()
        return values.argmax(dim=1)

    @functools.lru_cache(maxsize=64)  # noqa: B019  (a head is a few bytes)
    def precision(self, score: Score, *, outputs: torch.dtype, device: torch.device, is_plain: bool) -> str:
        """Return the type in which `score` computes a score, as text for provenance."""
        own, wide = (str(each).removeprefix("torch.") for each in (outputs, _wide(device)))
        if is_plain or own == wide:
            return own
        return f"{own}, {wide} near saturation" if self._may_be_plain(score) else wide

    def score(
        self,
        values: Tensor,
        classes: Tensor,
        resolved_targets: Sequence[ResolvedTarget],
        scores: Sequence[Score],
        *,
        gradient: bool,
        is_plain: bool = False,
        step: float = 0.0,
    ) -> Scored:
        """Return each row's score of its own target, and its gradient, for outputs [n, K] or [n, K, h, w].

        With `is_plain` everything is computed in the outputs' type, bit for bit as plain torch does; otherwise only
        probabilities that are not near 0 or 1 are. `step` is the machine epsilon of the type that the model computed
        in.
        """
        for score in set(scores) - set(self.scores):  # only known after the model has run
            has = ", ".join(each.value for each in self.scores)
            raise FailedPrecondition(
                f"score: the model returns {self.outputs}, so it has no {score.value}; it has {has}"
            )
        rows = ScoredRows(values, classes, resolved_targets, scores)
        plain = None if is_plain else self._plain_rows(rows)  # bool, [n]
        # Only on a CPU: on a GPU `bool()` would synchronize.
        if plain is None or (values.device.type == "cpu" and bool(plain.all())):
            scored, grad_outputs = _differentiate(self._plain, rows, gradient=gradient)
        else:
            wide = replace(rows, values=values.to(_wide(values.device)))
            scored, grad_outputs = _differentiate(self._exact, wide, gradient=gradient)
            grad_outputs = None if grad_outputs is None else grad_outputs.to(values.dtype)
            if any(self._may_be_plain(score) for score in scores):
                other, other_grad_outputs = _differentiate(self._plain, rows, gradient=gradient)
                scored = torch.where(plain, other.to(scored.dtype), scored)
                if grad_outputs is not None and other_grad_outputs is not None:
                    by_row = plain.view(-1, *[1] * (values.ndim - 1))
                    grad_outputs = torch.where(by_row, other_grad_outputs, grad_outputs)
        return Scored(scored, grad_outputs, self._dead(rows, grad_outputs, step=step))

    def select(
        self, values: Tensor, classes: Tensor, resolved_targets: Sequence[ResolvedTarget], scores: Sequence[Score]
    ) -> Tensor:
        """Return each row's own score, [n], in the outputs' own type, with its graph."""
        return _each_score(self._plain, ScoredRows(values, classes, resolved_targets, scores))

    def _plain(self, rows: ScoredRows, score: Score) -> Tensor:
        """Return one kind of score of each row, [n], in the outputs' own type."""
        return select_targets(self._of(rows.values.shape[1])[score](self.sides(rows.values)), rows)

    def _exact(self, rows: ScoredRows, score: Score) -> Tensor:
        """As `_plain`, for outputs in float64, with formulas that keep all digits for probabilities near 0 and 1."""
        is_exclusive = self._is_exclusive(rows.values)

        def of(outputs: Tensor, index: Tensor) -> Tensor:
            if self.outputs == "probabilities" or score is Score.LOGIT:
                own = outputs.gather(1, index)
                return own.log() if score is Score.LOG_PROBABILITY else own
            if score is Score.MARGIN:
                return outputs.gather(1, index) - _others(outputs, index).amax(dim=1, keepdim=True)
            log_probability = nn.functional.logsigmoid(_log_odds(outputs, index, is_exclusive=is_exclusive))
            return log_probability if score is Score.LOG_PROBABILITY else log_probability.exp()

        return over_both(of, self.sides(rows.values), rows, sign=-1)

    @torch.no_grad()
    def _plain_rows(self, rows: ScoredRows) -> Tensor:
        """Return which rows, bool [n], are accurate in the outputs' type: probabilities that are not near 0 or 1."""
        may_be = torch.tensor([self._may_be_plain(score) for score in rows.scores], device=rows.values.device)
        if not any(self._may_be_plain(score) for score in rows.scores):
            return may_be
        is_exclusive = self._is_exclusive(rows.values)

        def beyond(outputs: Tensor, index: Tensor) -> Tensor:
            odds = _log_odds(outputs, index, is_exclusive=is_exclusive)
            return 1 - ((odds >= LEAST_LOG_ODDS) & (odds <= MOST_LOG_ODDS)).to(outputs.dtype)  # also 1 for NaN

        return may_be & (over_both(beyond, self.sides(rows.values), rows, sign=1) == 0)

    @torch.no_grad()
    def _dead(self, rows: ScoredRows, grad_outputs: Tensor | None, *, step: float) -> Tensor:
        if grad_outputs is None:
            return torch.zeros(len(rows.values), dtype=torch.bool, device=rows.values.device)
        if self.outputs == "logits":
            return grad_outputs.flatten(1).abs().amax(dim=1) < DEAD
        is_single = rows.values.shape[1] == 1

        def alive(outputs: Tensor, index: Tensor) -> Tensor:
            # For a single output the model computed p of class 1, whichever class is explained.
            p = outputs[:, 1:] if is_single else outputs.gather(1, index)
            return ((p > DEAD) & (1 - p > LOST_STEPS * step)).to(outputs.dtype)

        return over_both(alive, self.sides(rows.values), rows, sign=1) == 0

    def _may_be_plain(self, score: Score) -> bool:
        return score is Score.PROBABILITY and self.outputs == "logits"

    def _is_exclusive(self, values: Tensor) -> bool:
        return self.activation == "softmax" and values.shape[1] > 1

    def _of(self, n_outputs: int) -> _Scores:
        if self.outputs == "probabilities":
            return _PROBABILITIES
        return _SIGMOID if self.activation == "sigmoid" or n_outputs == 1 else _SOFTMAX


_Select = Callable[[ScoredRows, Score], Tensor]  # returns one kind of score of each row, [n]


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _differentiate(select: _Select, rows: ScoredRows, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the scores, [n], and if `gradient` their gradients at the outputs."""
    leaf = rows.values.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        scored = _each_score(select, replace(rows, values=leaf))
        grad_outputs = torch.autograd.grad(scored.sum(), leaf)[0] if gradient else None
    return scored.detach(), grad_outputs


def _each_score(select: _Select, rows: ScoredRows) -> Tensor:
    """Return each row's score, [n], computing each kind of score for its own rows only."""
    if len(set(rows.scores)) == 1:
        return select(rows, rows.scores[0])
    selected = rows.values.new_empty(len(rows.scores))
    for score in dict.fromkeys(rows.scores):
        indices = [i for i, each in enumerate(rows.scores) if each is score]
        index = torch.tensor(indices, device=rows.values.device)
        targets = [rows.targets[i] for i in indices]
        own = ScoredRows(rows.values[index], rows.classes[index], targets, [score] * len(indices))
        selected = selected.index_put((index,), select(own, score))
    return selected


def _log_odds(logits: Tensor, index: Tensor, *, is_exclusive: bool) -> Tensor:
    """Return log(p / (1 − p)) of a class at each pixel, in the shape of its index, [n, 1] or [n, 1, h, w]."""
    own = logits.gather(1, index)
    return own - _others(logits, index).logsumexp(dim=1, keepdim=True) if is_exclusive else own


def _others(logits: Tensor, index: Tensor) -> Tensor:
    """Return the logits with that of the class itself replaced by the least float."""
    return logits.scatter(1, index, torch.finfo(logits.dtype).min)
