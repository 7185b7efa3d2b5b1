"""Regions: sums scores over the region and for the classes of a resolved target."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..domain import ResolvedTarget
from ..errors import FailedPrecondition, InvalidArgument


def _added(
    of: Callable[[Tensor, Tensor], Tensor],
    sides: Tensor,
    values: Tensor,
    classes: Tensor,
    resolved_targets: Sequence[ResolvedTarget],
) -> Tensor:
    """Return the sums, [n], of `of` for each row's class over the pixels of its region."""
    if values.ndim == 2:
        _check_no_region(resolved_targets)
        return of(sides, classes[:, None])[:, 0]
    own = largest_class(values) if any(resolved.each_pixel for resolved in resolved_targets) else None
    rows = []
    for i, resolved in enumerate(resolved_targets):
        row = _cut(sides[i], resolved)[None]  # [1, K, h, w]
        whole = (
            classes[i].view(1, 1, 1).expand(1, *sides.shape[2:]) if own is None or not resolved.each_pixel else own[i]
        )
        rows.append(of(row, _cut(whole, resolved)[None]).sum())
    return torch.stack(rows)


def over_both(
    of: Callable[[Tensor, Tensor], Tensor],
    sides: Tensor,
    values: Tensor,
    classes: Tensor,
    resolved_targets: Sequence[ResolvedTarget],
    *,
    sign: int,
) -> Tensor:
    """As `_added`, plus `sign` times the same for the class that a contrast target subtracts."""
    positive = _added(of, sides, values, classes, resolved_targets)
    others, counts = _negatives(resolved_targets, sides)
    return (
        positive if counts is None else positive + sign * _added(of, sides, values, others, resolved_targets) * counts
    )


def largest_class(values: Tensor) -> Tensor:
    """Return the class, [n, 1, h, w], of each pixel's largest output; for a single output always class 1."""
    return values.detach().argmax(dim=1, keepdim=True) + int(values.shape[1] == 1)


def _negatives(resolved_targets: Sequence[ResolvedTarget], sides: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the classes, [n], whose score is subtracted, and which rows, bool [n], have one; None if none has."""
    if all(resolved.negative is None for resolved in resolved_targets):
        return torch.empty(0), None
    largest = sides.shape[1] - 1
    others = torch.tensor([min(resolved.negative or 0, largest) for resolved in resolved_targets], device=sides.device)
    return others, torch.tensor([resolved.negative is not None for resolved in resolved_targets], device=sides.device)


def select_targets(
    scored: Tensor, classes: Tensor, resolved_targets: Sequence[ResolvedTarget], own: Tensor | None
) -> Tensor:
    """Return the scores, [n], of the targets: of a class, minus that of a contrast class, over a region."""
    if scored.ndim == 4:
        scored = _over_regions(scored, resolved_targets, own)  # [n, K]
    else:
        _check_no_region(resolved_targets)
    picked = scored.gather(1, classes[:, None])[:, 0]
    others, counts = _negatives(resolved_targets, scored)
    return picked if counts is None else picked - scored.gather(1, others[:, None])[:, 0] * counts


def _over_regions(scored: Tensor, resolved_targets: Sequence[ResolvedTarget], own: Tensor | None) -> Tensor:
    n_classes = scored.shape[1]
    rows = []
    for i, (row, resolved) in enumerate(zip(scored, resolved_targets, strict=True)):  # [K, h, w]
        if resolved.each_pixel and own is not None:
            row = row.gather(0, own[i])  # [1, h, w]
        rows.append(_cut(row, resolved).sum(dim=(1, 2)).expand(n_classes))
    return torch.stack(rows)


def _check_no_region(resolved_targets: Sequence[ResolvedTarget]) -> None:
    if any(resolved.region for resolved in resolved_targets):
        raise FailedPrecondition("target.dense.region: the model returns scores for the whole image, not each pixel")


def _cut(row: Tensor, resolved: ResolvedTarget) -> Tensor:
    """Return the target's region, [K, h, w], of a row's outputs. Raises `InvalidArgument` if it is out of bounds."""
    if (region := resolved.region) is None:
        return row
    height, width = row.shape[1:]
    if region.top + region.height > height or region.left + region.width > width:
        raise InvalidArgument(
            f"target.dense.region: it ends at [{region.top + region.height}, {region.left + region.width}], "
            f"the model's output is [{height}, {width}]"
        )
    return row[:, region.top : region.top + region.height, region.left : region.left + region.width]
