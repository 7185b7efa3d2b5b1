"""Interpretation: a model's outputs become the output of the kernel, with classes, probabilities and scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...domain import ResolvedTarget, Score
from .head import Head


@dataclass(frozen=True, slots=True)
class KernelOutput:
    """The output of one run of the kernel, on the device."""

    explained: Tensor  # [n], class indices
    scores: Tensor  # [n], usually float64
    is_dead: Tensor  # bool, [n]: whether the gradient at the outputs is numerically zero
    predicted: Tensor  # [n], class indices
    probabilities: Tensor  # [n, K]
    output_shape: tuple[int, ...]  # K, or K, h, w
    # At least float32: [n, C, H, W], or [n, c, h, w] of a layer; None if not requested
    gradients: Tensor | None = None
    activations: Tensor | None = None  # [n, c, h, w] of a layer


def interpret_outputs(
    outputs: Tensor,
    head: Head,
    resolved_targets: Sequence[ResolvedTarget],
    wanted: Sequence[Score],
    *,
    gradient: bool,
    plain_head: bool,
    step: float,
) -> tuple[KernelOutput, Tensor | None]:
    """Interpret outputs, [n, K] or [n, K, h, w]; also return the gradients of the scores at them, if requested.

    `step` is the rounding step of the outputs, relative to their size.
    """
    values = outputs.detach() if plain_head else at_least_float32(outputs.detach())
    with torch.no_grad():
        probabilities = head.probabilities(values)  # [n, K]
        predicted = head.predicted(values, probabilities)
        explained = _classes(resolved_targets, predicted, probabilities.shape[1])
    scored = head.score(values, explained, resolved_targets, wanted, gradient=gradient, is_plain=plain_head, step=step)
    shape = (probabilities.shape[1], *outputs.shape[2:])
    return KernelOutput(explained, scored.scores, scored.is_dead, predicted, probabilities, shape), scored.grad_outputs


def at_least_float32(values: Tensor) -> Tensor:
    """Convert half-precision values to float32; others are returned as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _classes(resolved_targets: Sequence[ResolvedTarget], predicted: Tensor, n_classes: int) -> Tensor:
    if all(resolved.positive is None for resolved in resolved_targets):
        return predicted
    given = torch.tensor(
        [-1 if resolved.positive is None else min(resolved.positive, n_classes - 1) for resolved in resolved_targets]
    )
    given = given.to(predicted.device)
    return torch.where(given < 0, predicted, given)
