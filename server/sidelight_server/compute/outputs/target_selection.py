"""Target selection: takes the score of each row's target, summed over its region, from the scores of all classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...domain import ResolvedTarget, Score
from ...errors import FailedPrecondition, InvalidArgument


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """The outputs of n rows, with the class and the kind of score that each explains."""

    values: Tensor  # [n, K], or [n, K, h, w] of a dense model
    classes: Tensor  # [n]
    targets: Sequence[ResolvedTarget]
    scores: Sequence[Score]

    @property
    def largest_classes(self) -> Tensor | None:
        """The class of each pixel's largest output, [n, 1, h, w], if a target needs it; 1 for a single output."""
        if not any(target.each_pixel for target in self.targets):
            return None
        return self.values.detach().argmax(dim=1, keepdim=True) + int(self.values.shape[1] == 1)


def over_both(of: Callable[[Tensor, Tensor], Tensor], sides: Tensor, rows: ScoredRows, *, sign: int) -> Tensor:
    """Return the sums, [n], of `of` for each row's class over the pixels of its region.

    `sides` are the outputs with one column per class. `sign` times the same is added for the class that a contrast
    target subtracts.
    """
    positive = _add_over_region(of, sides, rows)
    others, counts = _negatives(rows.targets, sides)
    if counts is None:
        return positive
    return positive + sign * _add_over_region(of, sides, replace(rows, classes=others)) * counts


def _add_over_region(of: Callable[[Tensor, Tensor], Tensor], sides: Tensor, rows: ScoredRows) -> Tensor:
    if sides.ndim == 2:
        _check_no_region(rows.targets)
        return of(sides, rows.classes[:, None])[:, 0]
    largest, summed = rows.largest_classes, []
    for i, target in enumerate(rows.targets):
        if target.each_pixel and largest is not None:
            index = largest[i]  # [1, h, w]
        else:
            index = rows.classes[i].view(1, 1, 1).expand(1, *sides.shape[2:])
        summed.append(of(_cut(sides[i], target)[None], _cut(index, target)[None]).sum())
    return torch.stack(summed)


def _negatives(targets: Sequence[ResolvedTarget], sides: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the classes, [n], whose score is subtracted, and which rows, bool [n], have one; None if none has."""
    if all(target.negative is None for target in targets):
        return torch.empty(0), None
    largest = sides.shape[1] - 1
    others = torch.tensor([min(target.negative or 0, largest) for target in targets], device=sides.device)
    return others, torch.tensor([target.negative is not None for target in targets], device=sides.device)


def select_targets(scored: Tensor, rows: ScoredRows) -> Tensor:
    """Return the scores, [n], of the targets: of a class, minus that of a contrast class, over a region.

    `scored` has the score of each class, and of each pixel of a dense model.
    """
    if scored.ndim == 4:
        scored = _over_regions(scored, rows)  # [n, K]
    else:
        _check_no_region(rows.targets)
    picked = scored.gather(1, rows.classes[:, None])[:, 0]
    others, counts = _negatives(rows.targets, scored)
    return picked if counts is None else picked - scored.gather(1, others[:, None])[:, 0] * counts


def _over_regions(scored: Tensor, rows: ScoredRows) -> Tensor:
    n_classes, largest = scored.shape[1], rows.largest_classes
    summed = []
    for i, (row, target) in enumerate(zip(scored, rows.targets, strict=True)):  # [K, h, w]
        if target.each_pixel and largest is not None:
            row = row.gather(0, largest[i])  # [1, h, w]
        summed.append(_cut(row, target).sum(dim=(1, 2)).expand(n_classes))
    return torch.stack(summed)


def _check_no_region(targets: Sequence[ResolvedTarget]) -> None:
    if any(target.region for target in targets):
        raise FailedPrecondition("target.dense.region: the model returns scores for the whole image, not each pixel")


def _cut(row: Tensor, target: ResolvedTarget) -> Tensor:
    """Return the target's region, [K, h, w], of a row's outputs. Raises `InvalidArgument` if it is out of bounds."""
    if (region := target.region) is None:
        return row
    height, width = row.shape[1:]
    if region.top + region.height > height or region.left + region.width > width:
        raise InvalidArgument(
            f"target.dense.region: it ends at [{region.top + region.height}, {region.left + region.width}], "
            f"the model's output is [{height}, {width}]"
        )
    return row[:, region.top : region.top + region.height, region.left : region.left + region.width]
